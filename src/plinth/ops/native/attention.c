/* Causal attention with rotated queries and keys, normed or not, on the matrix unit, forward and backward, one head at a time.

Scores of normed rows are at most sqrt(head_dim), so no maximum is taken before the exponential; of others it is. Scores are kept in base 2.
Every head's rows are padded to a multiple of 32 with zeros; causality keeps the padding out of real rows. */
#include "lanes.h"

typedef struct {
    int T, P, G, E, normed; /* rows, rows padded, heads in a row of qkv, head dimension, whether queries and keys are normed */
    float eps, scale;       /* of the norm; of the scores */
    const float *cosines, *sines; /* NULL: nothing is rotated */
} Shape;

/* One row: n = x / rms(x), or x itself; returns 1 / rms, or 1. */
INLINE float norm_row(const bf16 *x, __m512 n[8], const Shape *s, int E) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < E / 16; i++) n[i] = load16(x + 16 * i), sum = _mm512_fmadd_ps(n[i], n[i], sum);
    if (!s->normed) return 1.0f;
    float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / E + s->eps);
    for (int i = 0; i < E / 16; i++) n[i] = _mm512_mul_ps(n[i], _mm512_set1_ps(scale));
    return scale;
}

/* Every row to r = n cos + swapped n sin, times a factor. */
INLINE void rotate_rows(const bf16 *x, const Shape *s, int E, float factor, bf16 *out) {
    for (int t = 0; t < s->T; t++) {
        __m512 n[8];
        norm_row(x + (size_t)t * s->G * E, n, s, E);
        for (int i = 0; i < E / 16; i++) {
            __m512 r = n[i];
            if (s->cosines) {
                r = _mm512_mul_ps(n[i], _mm512_loadu_ps(s->cosines + (size_t)t * E + 16 * i));
                r = _mm512_fmadd_ps(n[(i + E / 32) % (E / 16)], _mm512_loadu_ps(s->sines + (size_t)t * E + 16 * i), r);
            }
            store16(out + (size_t)t * E + 16 * i, _mm512_mul_ps(r, _mm512_set1_ps(factor)));
        }
    }
    memset(out + (size_t)s->T * E, 0, (size_t)(s->P - s->T) * E * 2);
}

INLINE void copy_rows(const bf16 *x, size_t stride, const Shape *s, int E, bf16 *out) {
    for (int t = 0; t < s->T; t++) memcpy(out + (size_t)t * E, x + t * stride, E * 2);
    memset(out + (size_t)s->T * E, 0, (size_t)(s->P - s->T) * E * 2);
}

/* Takes the gradient of a rotated row back through rotation and norm. */
INLINE void unrotate_row(const bf16 *x, const float *grad, const Shape *s, int E, int t, float factor, bf16 *out) {
    __m512 n[8], g[8], d[8], dot = _mm512_setzero_ps();
    float scale = norm_row(x, n, s, E);
    for (int i = 0; i < E / 16; i++) g[i] = _mm512_loadu_ps(grad + 16 * i);
    for (int i = 0; i < E / 16; i++) {
        d[i] = g[i];
        if (s->cosines) {
            d[i] = _mm512_mul_ps(g[i], _mm512_loadu_ps(s->cosines + (size_t)t * E + 16 * i));
            d[i] = _mm512_fnmadd_ps(g[(i + E / 32) % (E / 16)], _mm512_loadu_ps(s->sines + (size_t)t * E + 16 * i), d[i]);
        }
        dot = _mm512_fmadd_ps(d[i], n[i], dot);
    }
    __m512 mean = s->normed ? _mm512_set1_ps(_mm512_reduce_add_ps(dot) / E) : _mm512_setzero_ps();
    for (int i = 0; i < E / 16; i++)
        store16(out + 16 * i, _mm512_mul_ps(_mm512_fnmadd_ps(n[i], mean, d[i]), _mm512_set1_ps(scale * factor)));
}

/* The largest of numbers 0 to `last`. */
INLINE float largest(const float *x, int last) {
    __m512 top = _mm512_set1_ps(x[0]);
    int i = 0;
    for (; i + 16 <= last + 1; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(x + i));
    const __mmask16 rest = (__mmask16)((1u << (last + 1 - i)) - 1);
    return _mm512_reduce_max_ps(_mm512_mask_max_ps(top, rest, top, _mm512_maskz_loadu_ps(rest, x + i)));
}

INLINE void forward_head(const bf16 *q, const uint32_t *k_tiles, const uint32_t *v_pairs, const Shape *s, int E, float *scores, bf16 *weights,
                         bf16 *y, size_t y_stride, float *lse) {
    const int P = s->P, W = P + 32; /* a row of the work space: never a power of two, whose lines would share places in the cache */
    for (int row = 0; row < P; row += 32) {
        const int keys = row + 32;
        for (int key = 0; key < keys; key += 32) {
            zero_results();
            for (int e = 0; e < E / 32; e++) {
                const uint32_t *b = k_tiles + ((size_t)e * (P / 16) + key / 16) * 256;
                multiply(q + (size_t)row * E + 32 * e, q + (size_t)(row + 16) * E + 32 * e, E * 2, b, b + 256, 64);
            }
            store_results(scores + key, W);
        }
        float inverse[32];
        for (int i = 0; i < 32; i++) {
            const __m512i last = _mm512_set1_epi32(row + i);
            const float top = s->normed ? 0.0f : largest(scores + (size_t)i * W, row + i);
            __m512 sum = _mm512_setzero_ps();
            for (int key = 0; key < keys; key += 16) {
                __m512 w = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(scores + (size_t)i * W + key), _mm512_set1_ps(top)));
                if (key >= row) {
                    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(key), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
                    w = _mm512_maskz_mov_ps(_mm512_cmple_epi32_mask(index, last), w);
                }
                sum = _mm512_add_ps(sum, w);
                store16(weights + (size_t)i * W + key, w);
            }
            float total = _mm512_reduce_add_ps(sum);
            inverse[i] = 1.0f / total;
            lse[row + i] = top + log2f(total);
        }
        for (int e = 0; e < E; e += 32) {
            zero_results();
            for (int key = 0; key < keys; key += 32) {
                const uint32_t *b = pairs_at(v_pairs, P, key, e);
                multiply(weights + key, weights + (size_t)16 * W + key, W * 2, b, b + 16, 128);
            }
            float block[32 * 32] __attribute__((aligned(64)));
            store_results(block, 32);
            for (int i = 0; i < 32 && row + i < s->T; i++) {
                store16(y + (row + i) * y_stride + e, _mm512_mul_ps(_mm512_load_ps(block + 32 * i), _mm512_set1_ps(inverse[i])));
                store16(y + (row + i) * y_stride + e + 16, _mm512_mul_ps(_mm512_load_ps(block + 32 * i + 16), _mm512_set1_ps(inverse[i])));
            }
        }
    }
}

INLINE void forward_all(const bf16 *qkv, const Shape *s, int B, int H, int K, int E, bf16 *y, float *lse) {
    const size_t P = s->P, head = P * E;
    bf16 *rows = aligned(head * 2), *weights = aligned(32 * (P + 32) * 2);
    uint32_t *k_tiles = aligned(head * 2), *v_pairs = aligned(head * 2);
    float *scores = aligned(32 * (P + 32) * 4);
    configure_tiles();
    for (int b = 0; b < B; b++)
        for (int k = 0; k < K; k++) {
            const bf16 *x = qkv + (size_t)b * s->T * s->G * E;
            rotate_rows(x + (H + k) * E, s, E, 1.0f, rows);
            pack_transposed(rows, E, P, E, k_tiles);
            copy_rows(x + (H + K + k) * E, (size_t)s->G * E, s, E, rows);
            pack_pairs(rows, E, P, E, v_pairs);
            for (int h = k * (H / K); h < (k + 1) * (H / K); h++) {
                rotate_rows(x + h * E, s, E, LOG2E * s->scale, rows);
                forward_head(rows, k_tiles, v_pairs, s, E, scores, weights, y + ((size_t)b * s->T * H + h) * E, (size_t)H * E,
                             lse + ((size_t)b * H + h) * P);
            }
        }
    _tile_release();
    free(rows), free(weights), free(k_tiles), free(v_pairs), free(scores);
}

/* What the backward pass of one head reads, each padded to P rows. */
typedef struct {
    bf16 *k_rows, *v_rows, *rows;
    uint32_t *q_tiles, *q_pairs, *k_pairs, *o_tiles, *o_pairs;
    bf16 *p_strip, *s_strip;
    uint32_t *s_tiles; /* (P / 32) x (P / 32) blocks of 32 queries x 32 keys, two tiles each */
    float *grad_k, *grad_v, *block, *delta;
} Work;

/* Gives 32 keys x 32 queries of the weights and of the scores' gradient, keys first, from their scores and products with the values. */
INLINE void gradient_block(const float *scores, const float *products, const float *lse, const float *delta, int diagonal, bf16 *p_out,
                           bf16 *s_out, uint32_t *tiles) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i left[16], right[16], previous = _mm512_setzero_si512();
#pragma GCC unroll 32
    for (int i = 0; i < 32; i++) {
        __m512 p[2], d[2];
        for (int j = 0; j < 2; j++) {
            p[j] = exp2_16(_mm512_sub_ps(_mm512_load_ps(scores + 32 * i + 16 * j), _mm512_loadu_ps(lse + 16 * j)));
            if (diagonal)
                p[j] = _mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * j)), _mm512_set1_epi32(i)), p[j]);
            d[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(_mm512_load_ps(products + 32 * i + 16 * j), _mm512_loadu_ps(delta + 16 * j)));
        }
        __m512i row = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
        _mm512_store_si512(p_out + 32 * i, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
        _mm512_store_si512(s_out + 32 * i, row);
        if (i % 2)
            interleave(previous, row, &left[i / 2], &right[i / 2]);
        previous = row;
    }
    transpose16(left);
    transpose16(right);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(tiles + 16 * i, left[i]);
        _mm512_store_si512(tiles + 256 + 16 * i, right[i]);
    }
}

INLINE void backward_head(const Work *w, const Shape *s, int E, const float *lse) {
    const int P = s->P;
    float *scores = w->block, *products = w->block + 1024;
    for (int key = 0; key < P; key += 32) {
        for (int row = key; row < P; row += 32) {
            zero_results();
            for (int e = 0; e < E / 32; e++) {
                const uint32_t *b = w->q_tiles + ((size_t)e * (P / 16) + row / 16) * 256;
                multiply(w->k_rows + (size_t)key * E + 32 * e, w->k_rows + (size_t)(key + 16) * E + 32 * e, E * 2, b, b + 256, 64);
            }
            store_results(scores, 32);
            zero_results();
            for (int e = 0; e < E / 32; e++) {
                const uint32_t *b = w->o_tiles + ((size_t)e * (P / 16) + row / 16) * 256;
                multiply(w->v_rows + (size_t)key * E + 32 * e, w->v_rows + (size_t)(key + 16) * E + 32 * e, E * 2, b, b + 256, 64);
            }
            store_results(products, 32);
            gradient_block(scores, products, lse + row, w->delta + row, row == key, w->p_strip + 32 * row, w->s_strip + 32 * row,
                           w->s_tiles + ((size_t)(row / 32) * (P / 32) + key / 32) * 512);
        }
        for (int e = 0; e < E; e += 32) {
            load_results(w->grad_v + (size_t)key * E + e, E);
            for (int row = key; row < P; row += 32) {
                const uint32_t *b = pairs_at(w->o_pairs, P, row, e);
                multiply(w->p_strip + 32 * row, w->p_strip + 32 * row + 512, 64, b, b + 16, 128);
            }
            store_results(w->grad_v + (size_t)key * E + e, E);
            load_results(w->grad_k + (size_t)key * E + e, E);
            for (int row = key; row < P; row += 32) {
                const uint32_t *b = pairs_at(w->q_pairs, P, row, e);
                multiply(w->s_strip + 32 * row, w->s_strip + 32 * row + 512, 64, b, b + 16, 128);
            }
            store_results(w->grad_k + (size_t)key * E + e, E);
        }
    }
}

/* Writes the gradient of one head's queries; the scores' gradients lie in tiles, queries first. */
INLINE void query_gradient(const Work *w, const Shape *s, int E, const bf16 *x, bf16 *out) {
    for (int row = 0; row < s->P; row += 32) {
        for (int e = 0; e < E; e += 32) {
            zero_results();
            for (int key = 0; key <= row; key += 32) {
                const uint32_t *a = w->s_tiles + ((size_t)(row / 32) * (s->P / 32) + key / 32) * 512;
                const uint32_t *b = pairs_at(w->k_pairs, s->P, key, e);
                multiply(a, a + 256, 64, b, b + 16, 128);
            }
            store_results(w->block + e, E);
        }
        for (int t = row; t < row + 32 && t < s->T; t++)
            unrotate_row(x + (size_t)t * s->G * E, w->block + (size_t)(t - row) * E, s, E, t, s->scale, out + (size_t)t * s->G * E);
    }
}

INLINE void take_output_gradient(const Work *w, const Shape *s, int E, const bf16 *y, const bf16 *grad_y, size_t stride) {
    for (int t = 0; t < s->P; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int e = 0; t < s->T && e < E; e += 16) sum = _mm512_fmadd_ps(load16(y + t * stride + e), load16(grad_y + t * stride + e), sum);
        w->delta[t] = _mm512_reduce_add_ps(sum);
    }
    copy_rows(grad_y, stride, s, E, w->rows);
    pack_transposed(w->rows, E, s->P, E, w->o_tiles);
    pack_pairs(w->rows, E, s->P, E, w->o_pairs);
}

INLINE void backward_all(const bf16 *qkv, const bf16 *y, const bf16 *grad_y, const float *lse, const Shape *s, int B, int H, int K, int E, bf16 *out) {
    const size_t P = s->P, head = P * E * 2;
    Work w = {aligned(head), aligned(head), aligned(head), aligned(head), aligned(head), aligned(head), aligned(head), aligned(head),
              aligned(P * 64), aligned(P * 64), aligned(P * P * 2), aligned(head * 2), aligned(head * 2), aligned(32 * 128 * 4), aligned(P * 4)};
    configure_tiles();
    for (int b = 0; b < B; b++)
        for (int k = 0; k < K; k++) {
            const size_t start = (size_t)b * s->T * s->G * E;
            const bf16 *x = qkv + start;
            rotate_rows(x + (H + k) * E, s, E, 1.0f, w.k_rows);
            pack_pairs(w.k_rows, E, P, E, w.k_pairs);
            copy_rows(x + (H + K + k) * E, (size_t)s->G * E, s, E, w.v_rows);
            memset(w.grad_k, 0, head * 2), memset(w.grad_v, 0, head * 2);
            for (int h = k * (H / K); h < (k + 1) * (H / K); h++) {
                const size_t at = ((size_t)b * s->T * H + h) * E;
                rotate_rows(x + h * E, s, E, LOG2E * s->scale, w.rows);
                pack_transposed(w.rows, E, P, E, w.q_tiles);
                pack_pairs(w.rows, E, P, E, w.q_pairs);
                take_output_gradient(&w, s, E, y + at, grad_y + at, (size_t)H * E);
                backward_head(&w, s, E, lse + ((size_t)b * H + h) * P);
                query_gradient(&w, s, E, x + h * E, out + start + h * E);
            }
            for (int t = 0; t < s->T; t++) {
                const size_t row = (size_t)t * s->G * E;
                unrotate_row(x + row + (H + k) * E, w.grad_k + (size_t)t * E, s, E, t, 1.0f / LOG2E, out + start + row + (H + k) * E);
                for (int e = 0; e < E; e += 16) store16(out + start + row + (H + K + k) * E + e, _mm512_loadu_ps(w.grad_v + (size_t)t * E + e));
            }
        }
    _tile_release();
    void *all[] = {w.k_rows, w.v_rows, w.rows, w.q_tiles, w.q_pairs, w.k_pairs, w.o_tiles, w.o_pairs, w.p_strip, w.s_strip, w.s_tiles, w.grad_k, w.grad_v, w.block, w.delta};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

#define FOR_HEAD_DIM(E, CALL)                  \
    switch (E) {                               \
        case 32: { enum { N = 32 }; CALL; } break;   \
        case 64: { enum { N = 64 }; CALL; } break;   \
        case 96: { enum { N = 96 }; CALL; } break;   \
        case 128: { enum { N = 128 }; CALL; } break; \
    }

static Shape shape_of(int T, int H, int K, int E, int normed, float eps, float scale, const float *cosines, const float *sines) {
    return (Shape){T, (T + 31) / 32 * 32, H + 2 * K, E, normed, eps, scale, cosines, sines};
}

/* qkv (B, T, H + 2 K, E) to y (B, T, H, E) and the logarithms, base 2, of the sums of weights (B, H, T padded to 32). */
EXPORT void attention_forward(const bf16 *qkv, const float *cosines, const float *sines, bf16 *y, float *lse, int B, int T, int H, int K, int E,
                              int normed, float eps, float scale) {
    const Shape s = shape_of(T, H, K, E, normed, eps, scale, cosines, sines);
    FOR_HEAD_DIM(E, forward_all(qkv, &s, B, H, K, N, y, lse))
}

EXPORT void attention_backward(const bf16 *qkv, const float *cosines, const float *sines, const bf16 *y, const bf16 *grad_y, const float *lse,
                               bf16 *grad_qkv, int B, int T, int H, int K, int E, int normed, float eps, float scale) {
    const Shape s = shape_of(T, H, K, E, normed, eps, scale, cosines, sines);
    FOR_HEAD_DIM(E, backward_all(qkv, y, grad_y, lse, &s, B, H, K, N, grad_qkv))
}
