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
    float *stream, *qkv;     /* (rows, width) and (rows, outputs of qkv), in blocks */
    float *partial;          /* a thread's results that go on into an operand or the logits: (rows, 64), in blocks */
    Operand normed, attended, gated, last;
    Span *groups, *writes;
    int num_groups, num_writes;
    size_t partial_floats; /* a thread's */
    char *scratch;
    size_t scratch_bytes; /* a thread's */
    int longest;          /* positions that the longest sequence has now, rounded up to a block */
} Work;

size_t attention_scratch_bytes(const Decoder *m, int longest);

/* Writes keys and values of all rows into their blocks; then, after a meeting, lets all rows attend. For one layer, by all threads. */
void write_keys(const Work *w, const Layer *layer);
void attend_rows(const Work *w, const Layer *layer, int thread);

INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
