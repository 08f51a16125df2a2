/* Products of rows and matrices in bf16, and the choice of the kernel by the matrix's format. */
#include "matrix.h"
#include "quantised.h"

static __thread int configured_rows;

void tile_rows(int rows) {
    if (rows == configured_rows) return;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {rows, rows, rows, rows, rows, rows, 16, 16}};
    __asm__ volatile("" ::"r"(&config) : "memory"); /* the instruction reads all of it, which the compiler does not know */
    _tile_loadconfig(&config);
    configured_rows = rows;
}

void release_tiles(void) {
    if (configured_rows) _tile_release();
    configured_rows = 0;
    quantised_forget();
}

size_t operand_bytes(const Matrix *w, int rows) {
    return w->format == FORMAT_BF16 ? (size_t)(rows + 15) / 16 * 16 * w->steps * 64 : quantised_operand_bytes(w, rows);
}

void place_operand(Operand *x, const Matrix *w, int rows, void *memory) {
    if (w->format != FORMAT_BF16) return quantised_place(x, w, rows, memory);
    *x = (Operand){.format = w->format, .inputs = w->inputs, .steps = w->steps, .group = w->group, .tiles = memory};
}

void prepare(const Operand *x, int first, int last) {
    if (x->format != FORMAT_BF16) quantised_prepare(x, first, last);
}

/* Up to 16 rows: two results, the weights read once. The processor fetches ahead by itself; to ask for what comes next slows it down. */
INLINE void few_rows(const bf16 *a, const bf16 *b, int steps, int fresh, float *block) {
    settle_memory();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, block, 128);
        _tile_loadd(1, block + 16, 128);
    }
    for (int k = 0; k < steps; k++, a += 512, b += 1024) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, block, 128);
    _tile_stored(1, block + 16, 128);
    settle_memory();
}

INLINE void many_rows(const bf16 *a, const bf16 *a_below, const bf16 *b, int steps, int slice, int fresh, float *block) {
    if (fresh)
        zero_results();
    else
        load_results(block, 32);
    const char *ahead = (const char *)b + steps * 2048; /* asked for in slices while this part is used by row after row */
    for (int k = 0; k < steps; k++, a += 512, a_below += 512, b += 1024) {
        for (int i = 0; i < 2; i++) _mm_prefetch(ahead + ((size_t)slice * 2 * steps + 2 * k + i) * 64, _MM_HINT_T1);
        multiply(a, a_below, 64, b, b + 512, 64);
    }
    store_results(block, 32);
}

void product_steps(const Matrix *w, const Operand *x, int panel, int row, int rows, int first, int last, int fresh, float *block) {
    const bf16 *a = x->tiles + (size_t)row * w->steps * 32 + first * 512;
    const bf16 *b = (const bf16 *)w->values + ((size_t)panel * w->steps + first) * 1024;
    tile_rows(rows < 16 ? rows : 16);
    if (rows <= 16)
        few_rows(a, b, last - first, fresh, block);
    else
        many_rows(a, a + (size_t)w->steps * 512, b, last - first, row / 32 % 16, fresh, block);
}

void product(const Matrix *w, const Operand *x, int panel, int row, int rows, float *block) {
    if (w->format == FORMAT_BF16)
        product_steps(w, x, panel, row, rows, 0, w->steps, 1, block);
    else
        quantised_product(w, x, panel, row, rows, block, 32);
}

void matrix_row(const Matrix *w, int output, float *values) {
    if (w->format != FORMAT_BF16) return quantised_row(w, output, values);
    const uint32_t *pairs = (const uint32_t *)w->values + (size_t)(output / 32) * w->steps * 512 + output % 32 / 16 * 256 + output % 16;
    for (int k = 0; k < w->steps; k++, pairs += 512, values += 32)
        for (int i = 0; i < 16; i++) {
            values[2 * i] = to_float((bf16)pairs[16 * i]);
            values[2 * i + 1] = to_float((bf16)(pairs[16 * i] >> 16));
        }
}
