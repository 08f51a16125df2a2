/* A decoder that generates: all rows of a call through all layers, keys and values in blocks of 32 positions. Mirrored by plinth.ops.decoder. */
#pragma once
#include "matrix.h"
#include "pool.h"

enum { BLOCK = 32, TILE = 16, MOST_VECTORS = 8 }; /* positions of a block; rows of a tile; vectors of sixteen in a head */

typedef struct {
    Matrix qkv, out, gate_up, down; /* a panel of gate_up holds sixteen gates, then their sixteen ups */
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm; /* scales, filled up with zeros to a multiple of 32; null for ones */
    bf16 *keys;   /* [blocks][kv heads][2 halves][head_dim / 32][16 pairs of dimensions][16 positions][2] */
    bf16 *values; /* [blocks][kv heads][head_dim / 16][16 pairs of positions][16 dimensions][2] */
} Layer;

typedef struct {
    int hidden_size, num_layers, num_heads, num_kv_heads, head_dim;
    float norm_eps, attention_factor, output_multiplier, logit_softcap; /* the last 0 for none */
    Matrix embed, head;
    const float *final_norm;
    const float *cosines, *sines; /* (positions, head_dim), the sines signed */
    const Layer *layers;
} Decoder;

typedef struct {
    int num_rows, max_blocks, num_wanted, threads;
    const int32_t *tokens, *positions, *sequences; /* of the rows; those of one sequence consecutive, positions rising by one */
    const int32_t *block_tables;                   /* (sequences, max_blocks) */
    const int32_t *wanted;                         /* rows whose logits or hidden states are wanted */
    float *logits, *hidden;                        /* (wanted, vocabulary) or (wanted, hidden_size); one of them null */
    void *memory;                                  /* decoder_bytes, aligned to 64 */
} Call;

/* Consecutive rows of one sequence: at most as many as one tile takes of a key head's queries, or those that write to one block. */
typedef struct {
    int first, rows;
} Span;

/* A call as the threads see it. */
typedef struct {
    const Decoder *model;
    const Call *call;
    int width, heads_a_tile; /* columns of the stream; query heads that share a key head and go into one tile */
    float *stream;           /* (rows, width), in blocks */
    bf16 *queries;           /* (rows, query heads, head_dim) */
    float *partial;          /* a thread's results that go on into an operand or the logits: (rows, its panels together), in blocks */
    Operand attended, gated, last;
    Operand *normed; /* a thread's: all the same, or one each where every thread norms the few rows for itself */
    Span *groups, *writes;
    int *first_write; /* of every 32 rows, and the end */
    int num_groups;
    size_t partial_floats; /* a thread's */
    char *scratch;
    size_t scratch_bytes; /* a thread's */
    int longest;          /* positions that the longest sequence has now, rounded up to a block */
} Work;

size_t attention_scratch_bytes(const Decoder *m, int longest);

/* Takes a head of rows row .. row + rows - 1, blocks from panel `panel` of the layer's qkv: a query is kept, a key or value goes into its block. */
void take_head(const Work *w, const Layer *layer, const float *blocks, int panel, int row, int rows);

/* Lets all rows attend: shared out among the threads, once all keys and values are written. */
void attend_rows(const Work *w, const Layer *layer, int thread);

/* The block of a key head that holds a position of a row's sequence. */
INLINE bf16 *head_block(bf16 *cache, const Work *w, int row, int position, int head) {
    const Call *c = w->call;
    const int block = c->block_tables[(size_t)c->sequences[row] * c->max_blocks + position / BLOCK];
    return cache + ((size_t)block * w->model->num_kv_heads + head) * BLOCK * w->model->head_dim;
}

/* The width of a head as a constant for the compiler. */
#define FOR_WIDTH(E, run) \
    switch (E) { \
    case 32: run(32); break; \
    case 64: run(64); break; \
    case 96: run(96); break; \
    case 128: run(128); break; \
    }

INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
