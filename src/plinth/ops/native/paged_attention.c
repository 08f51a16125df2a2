/* Attention of a call's rows over keys and values in blocks. A row's arithmetic is that of its own position: it takes the blocks of its
sequence in order, and what lies behind its position adds zeros. */
#include "decoder.h"

/* A share of attention: the heads of one tile. */
typedef struct {
    const Span *group;
    int kv, head, heads;
} Part;

/* What a thread needs to let the rows of one tile attend. */
typedef struct {
    bf16 *queries, *weights; /* [head_dim / 32][16][32] and [blocks][16][32] */
    float *scores, *sums;    /* (16, stride) and (16, head_dim) */
    size_t stride;
} Scratch;

size_t attention_scratch_bytes(const Decoder *m, int longest) {
    return (size_t)TILE * (m->head_dim * 2 + m->head_dim * 4 + longest * 2 + (longest + TILE) * 4);
}

INLINE Scratch lay_out(const Work *w, int thread) {
    char *memory = w->scratch + thread * w->scratch_bytes;
    const int E = w->model->head_dim;
    return (Scratch){.queries = (bf16 *)memory,
                     .sums = (float *)(memory + TILE * E * 2),
                     .weights = (bf16 *)(memory + TILE * E * 6),
                     .scores = (float *)(memory + TILE * (E * 6 + w->longest * 2)),
                     .stride = w->longest + TILE};
}

/* Scores of all blocks; the values, which are next, are asked for on the way. */
INLINE void score_blocks(const Scratch *s, const bf16 *keys, const bf16 *values, const int32_t *table, size_t block_size, int blocks, int E) {
    for (int j = 0; j < blocks; j++) {
        const bf16 *k = keys + table[j] * block_size;
        if (j + 1 < blocks)
            for (int i = 0; i < BLOCK * E; i += 32) _mm_prefetch((const char *)(keys + table[j + 1] * block_size + i), _MM_HINT_T0);
        for (int i = 0; i < BLOCK * E; i += 32) _mm_prefetch((const char *)(values + table[j] * block_size + i), _MM_HINT_T1);
        settle_memory();
        _tile_zero(0);
        _tile_zero(1);
        for (int e = 0; e < E / 32; e++) {
            _tile_loadd(4, s->queries + e * 512, 64);
            _tile_loadd(6, k + e * 512, 64);
            _tile_loadd(7, k + (E / 32 + e) * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, s->scores + BLOCK * j, s->stride * 4);
        _tile_stored(1, s->scores + BLOCK * j + 16, s->stride * 4);
        settle_memory();
    }
}

/* Turns the first n scores of a line into weights 2^(score - highest), zeros up to the last block; returns the inverse of their sum. */
INLINE float weigh(const Scratch *s, int line, int n, int blocks) {
    const float *scores = s->scores + line * s->stride;
    __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_loadu_ps(scores + i));
    }
    highest = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    for (int i = 0; i < BLOCK * blocks; i += 16) {
        __m512 weight = _mm512_setzero_ps();
        if (i < n) {
            const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
            weight = _mm512_maskz_mov_ps(mask, exp2_16(_mm512_sub_ps(_mm512_loadu_ps(scores + i), highest)));
            sum = _mm512_add_ps(sum, weight);
        }
        store16(s->weights + (size_t)i / 32 * 512 + line * 32 + i % 32, weight);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* Adds up the values of all blocks: `tiles` tiles of sixteen dimensions at once, from dimension `first`. */
INLINE void add_values(const Scratch *s, const bf16 *values, const int32_t *table, size_t block_size, int blocks, int E, int first, int tiles) {
    zero_results();
    for (int j = 0; j < blocks; j++) {
        const bf16 *v = values + table[j] * block_size + first * BLOCK;
        if (j + 1 < blocks)
            for (int i = 0; i < BLOCK * 16 * tiles; i += 32)
                _mm_prefetch((const char *)(values + table[j + 1] * block_size + first * BLOCK + i), _MM_HINT_T0);
        _tile_loadd(4, s->weights + (size_t)j * 512, 64);
        _tile_loadd(6, v, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, v + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (tiles == 4) {
            _tile_loadd(6, v + 1024, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, v + 1536, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, s->sums + first, E * 4);
    _tile_stored(1, s->sums + first + 16, E * 4);
    if (tiles == 4) {
        _tile_stored(2, s->sums + first + 32, E * 4);
        _tile_stored(3, s->sums + first + 48, E * 4);
    }
    settle_memory();
}

INLINE void attend_group(const Work *w, const Layer *layer, const Scratch *s, const Part *part, int E) {
    const Decoder *m = w->model;
    const Span *group = part->group;
    const int kv = part->kv, head = part->head, heads = part->heads;
    const Call *c = w->call;
    const int first = group->first, last = c->positions[first + group->rows - 1], blocks = last / BLOCK + 1;
    const int32_t *table = c->block_tables + (size_t)c->sequences[first] * c->max_blocks;
    const size_t block_size = (size_t)m->num_kv_heads * BLOCK * E;
    for (int r = 0; r < group->rows; r++)
        for (int h = 0; h < heads; h++) {
            const bf16 *query = w->queries + ((size_t)(first + r) * m->num_heads + head + h) * E;
            for (int e = 0; e < E / 32; e++)
                _mm512_store_si512(s->queries + e * 512 + (r * heads + h) * 32, _mm512_load_si512(query + 32 * e));
        }
    tile_rows(group->rows * heads);
    const bf16 *keys = layer->keys + (size_t)kv * BLOCK * E, *values = layer->values + (size_t)kv * BLOCK * E;
    score_blocks(s, keys, values, table, block_size, blocks, E);
    float inverse[TILE];
    for (int line = 0; line < group->rows * heads; line++) inverse[line] = weigh(s, line, c->positions[first + line / heads] + 1, blocks);
    for (int e = 0; e < E; e += 64) {
        if (E - e >= 64)
            add_values(s, values, table, block_size, blocks, E, e, 4);
        else
            add_values(s, values, table, block_size, blocks, E, e, 2);
    }
    for (int line = 0; line < group->rows * heads; line++)
        for (int e = 0; e < E; e += 32) {
            const __m512 scale = _mm512_set1_ps(inverse[line]);
            const float *sum = s->sums + line * E + e;
            put32(&w->attended, first + line / heads, (head + line % heads) * E + e, _mm512_mul_ps(_mm512_loadu_ps(sum), scale),
                  _mm512_mul_ps(_mm512_loadu_ps(sum + 16), scale));
        }
}

INLINE Part part_at(const Work *w, int share) {
    const int kv_heads = w->model->num_kv_heads, sharing = w->model->num_heads / kv_heads, parts = (sharing + w->heads_a_tile - 1) / w->heads_a_tile;
    const int kv = share / parts % kv_heads, from = share % parts * w->heads_a_tile, left = sharing - from;
    if (share >= w->num_groups * kv_heads * parts) return (Part){NULL, 0, 0, 0};
    return (Part){w->groups + share / parts / kv_heads, kv, kv * sharing + from, left < w->heads_a_tile ? left : w->heads_a_tile};
}

/* Asks for the first block of keys that a part will read. */
INLINE void expect_part(const Work *w, const Layer *layer, const Part *part, int E) {
    if (!part->group) return;
    const bf16 *keys = head_block(layer->keys, w, part->group->first, 0, part->kv);
    for (int i = 0; i < BLOCK * E; i += 32) _mm_prefetch((const char *)(keys + i), _MM_HINT_T0);
}

INLINE void attend_all(const Work *w, const Layer *layer, int thread, int E) {
    const Scratch s = lay_out(w, thread);
    for (Part part = part_at(w, next_share()), next; part.group; part = next) {
        next = part_at(w, next_share());
        expect_part(w, layer, &next, E);
        attend_group(w, layer, &s, &part, E);
    }
}

void attend_rows(const Work *w, const Layer *layer, int thread) {
#define RUN(E) attend_all(w, layer, thread, E)
    FOR_WIDTH(w->model->head_dim, RUN)
#undef RUN
}
