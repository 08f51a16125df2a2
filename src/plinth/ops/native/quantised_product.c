/* Products of rows and weights of 8 or 4 bits. One to a few rows go through AVX-512's integer products, more through the matrix unit. */
#include "quantised.h"

enum { FAR_BYTES = 8192, NEAR_BYTES = 1024, FEW_ROWS = 3, OPENED_GROUPS = 32 };

const int8_t quantised_levels[16] = {-124, -98, -78, -62, -47, -34, -22, -10, 1, 13, 25, 38, 52, 67, 86, 109};

/* One half of a panel: 16 outputs. */
typedef struct {
    const uint8_t *values;
    const bf16 *scales;
    int groups;
} Half;

/* Sixteen rows of an operand. */
typedef struct {
    const int8_t *quants;
    const float *scales;
} Block;

INLINE int value_bytes(int format) { return format == FORMAT_INT8 ? TILE_BYTES : TILE_BYTES / 2; }

INLINE Half half_at(const Matrix *w, int format, int index) {
    const int groups = groups_of(w->inputs);
    return (Half){(const uint8_t *)w->values + (size_t)index * groups * value_bytes(format), (const bf16 *)w->scales + (size_t)index * groups * 16,
                  groups};
}

INLINE Block block_at(const Operand *x, int row) {
    const size_t first = (size_t)(row / 16) * groups_of(x->inputs);
    return (Block){x->quants + first * TILE_BYTES, x->scales + first * 32};
}

/* Sixteen levels, four times over: a look-up of bytes by six bits then takes the low four of them and ignores the rest. */
INLINE __m512i level_table(int offset) {
    __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)quantised_levels));
    return _mm512_add_epi8(levels, _mm512_set1_epi8((char)offset));
}

/* Asks for weights that come later: far ahead into the second cache, which waits for more lines at once, near into the first. */
INLINE void ask_ahead(const uint8_t *values, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)values + FAR_BYTES + i, _MM_HINT_T1);
        _mm_prefetch((const char *)values + NEAR_BYTES + i, _MM_HINT_T0);
    }
}

/* Adds 64 weights, plus 128 each to be unsigned as the instruction wants the first factor, times four inputs of each row. */
#define ADD_QUAD(sums, weights, quad)                                                                          \
    for (int r = 0; r < rows; r++) {                                                                           \
        const int32_t *line = (const int32_t *)(x.quants + (size_t)g * TILE_BYTES + r * GROUP);                \
        sums[r][(quad) % chains] = _mm512_dpbusd_epi32(sums[r][(quad) % chains], weights, _mm512_set1_epi32(line[quad])); \
    }

/* A few rows, a constant wherever this is called; the integer sums of a row are gathered in several chains, which work side by side. */
INLINE void few_rows(int format, int rows, Half w, Block x, float *out, size_t stride) {
    const int chains = rows == 1 ? 4 : 2, bytes = value_bytes(format);
    const __m512i table = level_table(128), sign = _mm512_set1_epi8((char)0x80);
    __m512 totals[FEW_ROWS];
    for (int r = 0; r < rows; r++) totals[r] = _mm512_setzero_ps();
    for (int g = 0; g < w.groups; g++, w.values += bytes) {
        __m512i sums[FEW_ROWS][4];
        const float *scales = x.scales + (size_t)g * 32;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < chains; c++) sums[r][c] = c ? _mm512_setzero_si512() : _mm512_set1_epi32(((const int32_t *)scales)[16 + r]);
        ask_ahead(w.values, bytes);
        if (format == FORMAT_INT8)
            for (int q = 0; q < 16; q++) {
                __m512i weights = _mm512_xor_si512(_mm512_load_si512(w.values + 64 * q), sign);
                ADD_QUAD(sums, weights, q)
            }
        else
            for (int q = 0; q < 8; q++) {
                __m512i both = _mm512_load_si512(w.values + 64 * q);
                __m512i low = _mm512_permutexvar_epi8(both, table);
                __m512i high = _mm512_permutexvar_epi8(_mm512_srli_epi16(both, 4), table);
                ADD_QUAD(sums, low, q)
                ADD_QUAD(sums, high, q + 8)
            }
        for (int r = 0; r < rows; r++) {
            __m512i sum = _mm512_add_epi32(sums[r][0], sums[r][1]);
            if (chains == 4) sum = _mm512_add_epi32(sum, _mm512_add_epi32(sums[r][2], sums[r][3]));
            __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), load16(w.scales + g * 16));
            totals[r] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scales[r]), totals[r]);
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(out + r * stride, totals[r]);
}

/* A group's weights as the matrix unit reads them: where they lie, or unpacked to `room`. */
INLINE const void *second_operand(int format, const uint8_t *values, __m512i table, uint8_t *room) {
    if (format == FORMAT_INT8) return values;
    for (int q = 0; q < 8; q++) {
        __m512i both = _mm512_load_si512(values + 64 * q);
        _mm512_store_si512(room + 64 * q, _mm512_permutexvar_epi8(both, table));
        _mm512_store_si512(room + 64 * q + 512, _mm512_permutexvar_epi8(_mm512_srli_epi16(both, 4), table));
    }
    return room;
}

/* The sums of one group, times both scales, onto the totals of each row. */
INLINE void add_group(int rows, const int32_t *sums, const bf16 *weight_scales, const float *scales, __m512 totals[16]) {
    const __m512 columns = load16(weight_scales);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * r)), columns);
        totals[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[r]), totals[r]);
    }
}

/* Multiplies group g into a tile, lays down the tile before it, and adds up what the one before that laid down: so no unit waits. */
#define PIPE(tile, before, second_before, left, right)                                                      \
    if (g < w.groups) {                                                                                     \
        const void *weights = second_operand(format, w.values, table, room[tile]);                          \
        if (fetch) ask_ahead(w.values, bytes);                                                              \
        w.values += bytes;                                                                                  \
        settle_memory();                                                                                    \
        _tile_zero(tile);                                                                                   \
        _tile_loadd(left, x.quants + (size_t)g * TILE_BYTES, 64);                                           \
        _tile_loadd(right, weights, 64);                                                                    \
        _tile_dpbssd(tile, left, right);                                                                    \
    }                                                                                                       \
    if (g >= 1 && g <= w.groups) _tile_stored(before, sums[before], 64);                                    \
    settle_memory();                                                                                        \
    if (g >= 2) add_group(rows, sums[second_before], w.scales + (g - 2) * 16, x.scales + (g - 2) * 32, totals); \
    if (++g == w.groups + 2) break;

/* Up to `rows` rows, a constant wherever this is called; rows beyond those that the tiles are configured for come out as anything. */
INLINE void many_rows(int format, int rows, Half w, Block x, int fetch, float *out, size_t stride) {
    int32_t sums[4][256] __attribute__((aligned(64)));
    uint8_t room[4][TILE_BYTES] __attribute__((aligned(64)));
    const __m512i table = level_table(0);
    const int bytes = value_bytes(format);
    __m512 totals[16];
    for (int r = 0; r < rows; r++) totals[r] = _mm512_setzero_ps();
    for (int g = 0;;) {
        PIPE(0, 3, 2, 4, 6)
        PIPE(1, 0, 3, 5, 7)
        PIPE(2, 1, 0, 4, 6)
        PIPE(3, 2, 1, 5, 7)
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(out + r * stride, totals[r]);
}

INLINE void half_product(int format, Half w, Block x, int rows, int fetch, float *out, size_t stride) {
    if (rows == 1)
        few_rows(format, 1, w, x, out, stride);
    else if (rows == 2)
        few_rows(format, 2, w, x, out, stride);
    else if (rows == 3)
        few_rows(format, 3, w, x, out, stride);
    else if (rows <= 4)
        many_rows(format, 4, w, x, fetch, out, stride);
    else if (rows <= 8)
        many_rows(format, 8, w, x, fetch, out, stride);
    else
        many_rows(format, 16, w, x, fetch, out, stride);
}

/* Any rows times half a panel, sixteen at a time; `fetch`: ask for the weights that come next, which no row has used before. */
INLINE void rows_of(int format, Half w, const Operand *x, int row, int rows, int fetch, float *out, size_t stride) {
    for (int first = 0; first < rows; first += 16) {
        const int count = rows - first < 16 ? rows - first : 16;
        if (count > FEW_ROWS) tile_rows(count);
        half_product(format, w, block_at(x, row + first), count, fetch && first == 0, out + first * stride, stride);
    }
}

static void rows_int8(Half w, const Operand *x, int row, int rows, int fetch, float *out, size_t stride) {
    rows_of(FORMAT_INT8, w, x, row, rows, fetch, out, stride);
}

static void rows_int4(Half w, const Operand *x, int row, int rows, int fetch, float *out, size_t stride) {
    rows_of(FORMAT_INT4, w, x, row, rows, fetch, out, stride);
}

/* Weights of 4 bits unpacked, both halves of the panel that this thread read last: more than one tile of rows asks for them again. */
static __thread struct {
    uint8_t values[2][OPENED_GROUPS * TILE_BYTES] __attribute__((aligned(64)));
    const void *from[2];
} opened;

void quantised_forget(void) { opened.from[0] = opened.from[1] = NULL; }

static Half open_half(Half w, int half) {
    if (opened.from[half] != w.values) {
        for (int g = 0; g < w.groups; g++)
            second_operand(FORMAT_INT4, w.values + (size_t)g * (TILE_BYTES / 2), level_table(0), opened.values[half] + (size_t)g * TILE_BYTES);
        opened.from[half] = w.values;
    }
    return (Half){opened.values[half], w.scales, w.groups};
}

void quantised_product(const Matrix *w, const Operand *x, int panel, int row, int rows, float *out, size_t stride) {
    const int again = w->format == FORMAT_INT4 && rows > 16 && groups_of(w->inputs) <= OPENED_GROUPS;
    for (int half = 0; half < 2; half++, out += 16) {
        const Half weights = half_at(w, w->format, 2 * panel + half);
        if (w->format == FORMAT_INT8)
            rows_int8(weights, x, row, rows, row == 0, out, stride);
        else if (again)
            rows_int8(open_half(weights, half), x, row, rows, 0, out, stride);
        else
            rows_int4(weights, x, row, rows, row == 0, out, stride);
    }
}

void quantised_row(const Matrix *w, int output, float *values) {
    const Half half = half_at(w, w->format, output / 16);
    const int lane = output % 16;
    memset(values, 0, w->steps * 32 * sizeof(float));
    for (int k = 0; k < w->inputs; k++) {
        const int g = k / GROUP, quad = k % GROUP / 4, byte = quad * 64 + lane * 4 + k % 4;
        const float scale = to_float(half.scales[g * 16 + lane]);
        if (w->format == FORMAT_INT8) {
            values[k] = scale * (int8_t)half.values[(size_t)g * TILE_BYTES + byte];
        } else {
            const uint8_t both = half.values[(size_t)g * (TILE_BYTES / 2) + byte % 512];
            values[k] = scale * quantised_levels[quad < 8 ? both & 15 : both >> 4];
        }
    }
}
