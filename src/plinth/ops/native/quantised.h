/* Weights of 8 and of 4 bits, as a format of matrix.h.

Inputs lie in groups of 64, which share a scale (bf16): a weight is its scale times an int8, of 4 bits times one of sixteen int8.
Values: [panels][2 halves][groups][16 quads of inputs][16 outputs][4]; of 4 bits quads i and i + 8 share bytes, the first in the low bits.
Scales: [panels][2 halves][groups][16 outputs].
Rows are rounded to int8 as well, each group with a scale of its own. Sums over a group are integers and so exact, whichever unit
adds them; those over groups are fp32, in order. So a row's bits do not depend on its company. */
#pragma once
#include "matrix.h"

enum { GROUP = 64, TILE_BYTES = 1024 };

/* What a weight of 4 bits stands for: see plinth.ops.quantise.LEVELS. */
extern const int8_t quantised_levels[16];

/* Quants: [rows / 16][groups][16 rows][64]; scales: [rows / 16][groups][16 scales, then 16 int32: -128 times the sum of the row's quants]. */
size_t quantised_operand_bytes(const Matrix *w, int rows);
void quantised_place(Operand *x, const Matrix *w, int rows, void *memory);
void quantised_prepare(const Operand *x, int first, int last);
void quantised_product(const Matrix *w, const Operand *x, int panel, int row, int rows, float *out, size_t stride);
void quantised_forget(void); /* what a thread keeps of the last weights between products */
void quantised_row(const Matrix *w, int output, float *values);

INLINE int groups_of(int inputs) { return (inputs + GROUP - 1) / GROUP; }
