/* What the first matrix of a layer gives, head by head: queries and keys normed and rotated, keys and values into their blocks. */
#include "decoder.h"

/* x, a head of one row (32 numbers at the beginning of every block), to x / rms(x) times the scales of its norm, rotated to its position and
times `factor`; rounded. */
INLINE void norm_and_rotate(const float *x, const float *scales, const Decoder *m, int E, int position, float factor, __m512i out[MOST_VECTORS / 2]) {
    __m512 n[MOST_VECTORS], r[MOST_VECTORS], sum = _mm512_setzero_ps();
    for (int i = 0; i < E / 16; i++) n[i] = _mm512_load_ps(x + i / 2 * 1024 + i % 2 * 16), sum = _mm512_fmadd_ps(n[i], n[i], sum);
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / E + m->norm_eps));
    for (int i = 0; i < E / 16; i++) {
        n[i] = _mm512_mul_ps(n[i], scale);
        if (scales) n[i] = _mm512_mul_ps(n[i], _mm512_loadu_ps(scales + 16 * i));
    }
    const float *cosines = m->cosines + (size_t)position * E, *sines = m->sines + (size_t)position * E;
    for (int i = 0; i < E / 16; i++) {
        r[i] = _mm512_mul_ps(n[i], _mm512_loadu_ps(cosines + 16 * i));
        r[i] = _mm512_fmadd_ps(n[(i + E / 32) % (E / 16)], _mm512_loadu_ps(sines + 16 * i), r[i]);
        r[i] = _mm512_mul_ps(r[i], _mm512_set1_ps(factor));
    }
    for (int e = 0; e < E / 32; e++) out[e] = (__m512i)_mm512_cvtne2ps_pbh(r[2 * e + 1], r[2 * e]);
}

INLINE void keep_queries(const Work *w, const Layer *layer, const float *blocks, int head, int row, int rows, int E) {
    const Decoder *m = w->model;
    for (int r = 0; r < rows; r++) {
        __m512i query[MOST_VECTORS / 2];
        norm_and_rotate(blocks + 32 * r, layer->q_norm, m, E, w->call->positions[row + r], m->attention_factor, query);
        bf16 *out = w->queries + ((size_t)(row + r) * m->num_heads + head) * E;
        for (int e = 0; e < E / 32; e++) _mm512_store_si512(out + 32 * e, query[e]);
    }
}

/* Keys of the span's rows, the first of which is row `r` of the blocks, into their block of the cache; sixteen at once where they fill a tile. */
INLINE void write_keys(const Work *w, const Layer *layer, const float *blocks, const Span *span, int r, uint32_t *keys, int E) {
    const __m512i lines = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    const int start = w->call->positions[span->first];
    for (int i = 0, count; i < span->rows; i += count) {
        const int place = (start + i) % BLOCK;
        uint32_t *tiles = keys + place / 16 * (E / 32) * 256;
        __m512i key[16][MOST_VECTORS / 2];
        count = place % 16 == 0 && span->rows - i >= 16 ? 16 : 1;
        for (int j = 0; j < count; j++) norm_and_rotate(blocks + 32 * (r + i + j), layer->k_norm, w->model, E, start + i + j, 1.0f, key[j]);
        for (int e = 0; e < E / 32; e++) {
            if (count == 1) {
                _mm512_i32scatter_epi32(tiles + e * 256 + place % 16, lines, key[0][e], 4);
                continue;
            }
            __m512i tile[16];
            for (int j = 0; j < 16; j++) tile[j] = key[j][e];
            transpose16(tile);
            for (int j = 0; j < 16; j++) _mm512_store_si512(tiles + e * 256 + 16 * j, tile[j]);
        }
    }
}

/* Sixteen numbers of a value. One that is no number would spoil, through zero times it, whoever owns the block next; the row's key, which is
no number either, tells all rows of its own sequence. */
INLINE __m512 only_finite(__m512 x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(3e38f), _CMP_LT_OQ), x); }

INLINE void write_values(const Work *w, const float *blocks, const Span *span, int r, bf16 *values, int E) {
    const int start = w->call->positions[span->first];
    for (int i = 0, count; i < span->rows; i += count) {
        const int place = (start + i) % BLOCK, odd = place % 2;
        count = !odd && i + 1 < span->rows ? 2 : 1;
        for (int d = 0; d < E / 16; d++) {
            const float *x = blocks + d / 2 * 1024 + d % 2 * 16 + 32 * (r + i);
            const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(only_finite(_mm512_load_ps(x))));
            bf16 *line = values + d * 512 + place / 2 * 32;
            if (count == 2) {
                const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(only_finite(_mm512_load_ps(x + 32))));
                _mm512_store_si512(line, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
            } else
                _mm512_mask_storeu_epi16(line, odd ? 0xaaaaaaaau : 0x55555555u, odd ? _mm512_slli_epi32(first, 16) : first);
        }
    }
}

/* Asks for the lines that lone positions will write: each lies in a block of its own, far from the others. */
INLINE void expect_lines(const Work *w, bf16 *cache, const Span *span, int kv, int is_key, int E) {
    const int place = w->call->positions[span->first] % BLOCK;
    const bf16 *block = head_block(cache, w, span->first, w->call->positions[span->first], kv);
    if (span->rows > 2) return;
    for (int i = 0; is_key && i < E * 16; i += 32) __builtin_prefetch(block + place / 16 * E * 16 + i, 1);
    for (int d = 0; !is_key && d < E / 16; d++) __builtin_prefetch(block + d * 512 + place / 2 * 32, 1);
}

INLINE void take(const Work *w, const Layer *layer, const float *blocks, int head, int row, int rows, int E) {
    const Decoder *m = w->model;
    if (head < m->num_heads) return keep_queries(w, layer, blocks, head, row, rows, E);
    const int is_key = head < m->num_heads + m->num_kv_heads, kv = (head - m->num_heads) % m->num_kv_heads;
    const Span *first = w->writes + w->first_write[row / 32], *last = w->writes + w->first_write[row / 32 + 1];
    bf16 *cache = is_key ? layer->keys : layer->values;
    for (const Span *span = first; span < last; span++) expect_lines(w, cache, span, kv, is_key, E);
    for (const Span *span = first; span < last; span++) {
        bf16 *block = head_block(cache, w, span->first, w->call->positions[span->first], kv);
        if (is_key)
            write_keys(w, layer, blocks, span, span->first - row, (uint32_t *)block, E);
        else
            write_values(w, blocks, span, span->first - row, block, E);
    }
}

void take_head(const Work *w, const Layer *layer, const float *blocks, int panel, int row, int rows) {
#define RUN(E) take(w, layer, blocks, panel * 32 / E, row, rows, E)
    FOR_WIDTH(w->model->head_dim, RUN)
#undef RUN
}
