/* A matrix of the model as generation reads it, and the rows that it multiplies.

Outputs lie in panels of 32, padded with zeros. A panel is one stretch of memory, so a model's weights are read once and in order.
The law: a row's product has the same bits whatever other rows are multiplied beside it, however many, and by whichever thread. */
#pragma once
#include "lanes.h"

enum { FORMAT_BF16 = 0, FORMAT_INT8 = 1, FORMAT_INT4 = 2 };

/* Weights (outputs, inputs). Mirrored by plinth.ops.matrix.Matrix. */
typedef struct {
    int format, outputs, inputs;
    int panels, steps;  /* of 32 outputs and of 32 inputs, both rounded up */
    int group;          /* inputs that share a scale, 0 for bf16 */
    const void *values; /* bf16: [panels][steps][2 halves][16 pairs of inputs][16 outputs][2] */
    const void *scales; /* null for bf16 */
} Matrix;

/* Rows (rows, inputs) as the left operand of a matrix of some format; memory for a multiple of 16 rows. */
typedef struct {
    int format, inputs, steps, group;
    bf16 *tiles;   /* bf16: [rows / 16][steps][16 rows][32 inputs] */
    float *plain;  /* quantised formats: the rows as they were put, (rows, 32 steps), until `prepare` turns them into quants */
    int8_t *quants;
    float *scales; /* of the quants */
} Operand;

/* Returns the bytes that the operand of a matrix takes; `place_operand` lays it out in memory aligned to 64. */
size_t operand_bytes(const Matrix *w, int rows);
void place_operand(Operand *x, const Matrix *w, int rows, void *memory);

/* Puts inputs column .. column + 31 of a row. */
INLINE void put32(const Operand *x, int row, int column, __m512 low, __m512 high) {
    if (x->format == FORMAT_BF16) {
        bf16 *line = x->tiles + (((size_t)(row / 16) * x->steps + column / 32) * 16 + row % 16) * 32;
        _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
        float *line = x->plain + (size_t)row * x->steps * 32 + column;
        _mm512_store_ps(line, low);
        _mm512_store_ps(line + 16, high);
    }
}

/* Makes rows first .. last - 1, all of whose inputs have been put, ready for `product`. Nothing to do for bf16. */
void prepare(const Operand *x, int first, int last);

/* Results lie in blocks: element (row, column) of an array with `panels` panels of columns is BLOCK_AT(...)[row % 32 * 32 + column % 32]. */
#define BLOCK_AT(array, panels, row, panel) ((array) + ((size_t)((row) / 32) * (panels) + (panel)) * 1024)

/* Writes outputs 32 panel .. 32 panel + 31 of rows row .. row + rows - 1 to a block. `row` is a multiple of 32, rows is 1 to 32; lines of the
block beyond `rows` hold anything afterwards. */
void product(const Matrix *w, const Operand *x, int panel, int row, int rows, float *block);

/* The same for bf16 with the inputs from step `first` to `last` - 1 alone, added to what the block holds unless `fresh`. */
void product_steps(const Matrix *w, const Operand *x, int panel, int row, int rows, int first, int last, int fresh, float *block);

/* Writes the weights of one output, inputs rounded up to 32: the embedding of a token where the matrix is the head as well. */
void matrix_row(const Matrix *w, int output, float *values);

/* Configures this thread's tiles so that results and first operands have `rows` rows, unless they have; `release_tiles` when all is done. */
void tile_rows(int rows);
void release_tiles(void);
