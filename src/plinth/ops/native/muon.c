/* Muon's update. Its iterations run on the matrix unit: every singular value of a matrix moves towards 1, one matrix at a time in the second-level cache.

With X (m, n), m <= n:  G = X X^T,  P = a I + b G + c G G,  X <- P X.  G and G G are symmetric: only blocks on and above the diagonal
are computed, the others are mirrored. */
#include "lanes.h"

typedef struct {
    int m, n;
    bf16 *x, *next, *gram, *inner;
    uint32_t *columns, *pairs; /* x packed as the second operand of X X^T and of P X */
} Iterate;

/* Writes a block of 32 x 32 numbers at (i, j) of a symmetric matrix of m rows, and its mirror image at (j, i). */
INLINE void mirror_block(const float *block, bf16 *out, int m, int i, int j) {
    for (int r = 0; r < 32; r++) {
        __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(block + 32 * r + 16), _mm512_load_ps(block + 32 * r));
        _mm512_storeu_si512(out + (size_t)(i + r) * m + j, row);
    }
    for (int c = 0; i != j && c < 32; c += 16) {
        __m512i top[16], bottom[16];
        for (int r = 0; r < 16; r++) {
            top[r] = _mm512_load_si512(block + 32 * r + c);
            bottom[r] = _mm512_load_si512(block + 32 * (16 + r) + c);
        }
        transpose16(top);
        transpose16(bottom);
        for (int r = 0; r < 16; r++) {
            __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(bottom[r]), _mm512_castsi512_ps(top[r]));
            _mm512_storeu_si512(out + (size_t)(j + c + r) * m + i, row);
        }
    }
}

INLINE void multiply_block(const bf16 *left, int K, int i, const uint32_t *panels, int j, float *block) {
    zero_results();
    for (int k = 0; k < K; k += 32) {
        const uint32_t *b = pairs_at(panels, K, k, j);
        multiply(left + (size_t)i * K + k, left + (size_t)(i + 16) * K + k, (size_t)K * 2, b, b + 16, 128);
    }
    store_results(block, 32);
}

INLINE void iterate(Iterate *s, float a, float b, float c) {
    const int m = s->m, n = s->n;
    float block[32 * 32] __attribute__((aligned(64)));
    pack_columns(s->x, m, n, s->columns);
    for (int j = 0; j < m; j += 32)
        for (int i = 0; i <= j; i += 32) {
            multiply_block(s->x, n, i, s->columns, j, block);
            mirror_block(block, s->gram, m, i, j);
        }
    pack_pairs(s->gram, m, m, m, s->columns);
    for (int j = 0; j < m; j += 32)
        for (int i = 0; i <= j; i += 32) {
            multiply_block(s->gram, m, i, s->columns, j, block);
            for (int r = 0; r < 32; r++)
                for (int h = 0; h < 32; h += 16) {
                    __m512 g = load16(s->gram + (size_t)(i + r) * m + j + h);
                    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(c), _mm512_load_ps(block + 32 * r + h), _mm512_mul_ps(_mm512_set1_ps(b), g));
                    _mm512_store_ps(block + 32 * r + h, p);
                }
            for (int r = 0; i == j && r < 32; r++) block[33 * r] += a;
            mirror_block(block, s->inner, m, i, j);
        }
    pack_pairs(s->x, n, m, n, s->pairs);
    for (int j = 0; j < n; j += 32)
        for (int i = 0; i < m; i += 32) {
            multiply_block(s->inner, m, i, s->pairs, j, block);
            for (int r = 0; r < 32; r++) {
                __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(block + 32 * r + 16), _mm512_load_ps(block + 32 * r));
                _mm512_storeu_si512(s->next + (size_t)(i + r) * n + j, row);
            }
        }
    bf16 *swapped = s->x;
    s->x = s->next, s->next = swapped;
}

/* in (R, C), fp32, scaled to Frobenius norm 1, to x (m, n): itself, or its transpose where it is tall. */
INLINE void load_scaled(const float *in, int R, int C, bf16 *x) {
    double squares = 0.0;
    for (int r = 0; r < R; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < C; c += 16) {
            __m512 v = _mm512_loadu_ps(in + (size_t)r * C + c);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        squares += _mm512_reduce_add_ps(sum);
    }
    const __m512 scale = _mm512_set1_ps((float)(1.0 / (sqrt(squares) + 1e-7)));
    for (int r = 0; r < R; r += 16)
        for (int c = 0; c < C; c += 16) {
            __m512 v[16];
            for (int i = 0; i < 16; i++) v[i] = _mm512_mul_ps(scale, _mm512_loadu_ps(in + (size_t)(r + i) * C + c));
            if (R > C) transpose16((__m512i *)v);
            for (int i = 0; i < 16; i++) store16(x + (R > C ? (size_t)(c + i) * R + r : (size_t)(r + i) * C + c), v[i]);
        }
}

/* in (R, C), fp32, to out (R, C), bf16, by `steps` polynomials (a, b, c); R and C multiples of 32. */
EXPORT void orthogonalise(const float *in, bf16 *out, int R, int C, const float *polynomials, int steps) {
    const int m = R < C ? R : C, n = R < C ? C : R;
    const size_t size = (size_t)m * n * 2, square = (size_t)m * m * 2;
    Iterate s = {m, n, aligned(size), aligned(size), aligned(square), aligned(square), aligned(size), aligned(size)};
    load_scaled(in, R, C, s.x);
    configure_tiles();
    for (int i = 0; i < steps; i++) iterate(&s, polynomials[3 * i], polynomials[3 * i + 1], polynomials[3 * i + 2]);
    _tile_release();
    for (int r = 0; R <= C && r < R; r++) memcpy(out + (size_t)r * C, s.x + (size_t)r * C, (size_t)C * 2);
    for (int r = 0; R > C && r < R; r += 16)
        for (int c = 0; c < C; c += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) v[i] = _mm512_castps_si512(load16(s.x + (size_t)(c + i) * R + r));
            transpose16(v);
            for (int i = 0; i < 16; i++) store16(out + (size_t)(r + i) * C + c, _mm512_castsi512_ps(v[i]));
        }
    free(s.x), free(s.next), free(s.gram), free(s.inner), free(s.columns), free(s.pairs);
}

/* buffer <- momentum buffer + (1 - momentum) grad;  out <- momentum buffer + (1 - momentum) grad (Nesterov). Counts are multiples of 16. */
EXPORT void nesterov(const float *grad, float *buffer, float *out, long count, float momentum) {
    const __m512 rest = _mm512_set1_ps(1.0f - momentum);
    for (long i = 0; i < count; i += 16) {
        const __m512 g = _mm512_loadu_ps(grad + i), old = _mm512_loadu_ps(buffer + i);
        const __m512 moved = _mm512_fmadd_ps(rest, _mm512_sub_ps(g, old), old);
        _mm512_storeu_ps(buffer + i, moved);
        _mm512_storeu_ps(out + i, _mm512_fmadd_ps(rest, _mm512_sub_ps(g, moved), moved));
    }
}

/* weight <- keep weight - rate update. */
EXPORT void move_weights(float *weight, const bf16 *update, long count, float keep, float rate) {
    for (long i = 0; i < count; i += 16) {
        const __m512 kept = _mm512_mul_ps(_mm512_set1_ps(keep), _mm512_loadu_ps(weight + i));
        _mm512_storeu_ps(weight + i, _mm512_fnmadd_ps(_mm512_set1_ps(rate), load16(update + i), kept));
    }
}
