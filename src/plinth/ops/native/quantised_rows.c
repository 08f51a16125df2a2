/* Numbers rounded to int8 or to sixteen levels: rows for a product, weights into panels. */
#include "quantised.h"

size_t quantised_operand_bytes(const Matrix *w, int rows) {
    const size_t padded = (size_t)(rows + 15) / 16 * 16, groups = groups_of(w->inputs);
    return padded * (w->steps * 32 * sizeof(float) + groups * (GROUP + 2 * sizeof(float)));
}

void quantised_place(Operand *x, const Matrix *w, int rows, void *memory) {
    const size_t padded = (size_t)(rows + 15) / 16 * 16, groups = groups_of(w->inputs);
    float *plain = memory, *scales = plain + padded * w->steps * 32;
    *x = (Operand){.format = w->format, .inputs = w->inputs, .steps = w->steps, .group = GROUP, .plain = plain,
                   .scales = scales, .quants = (int8_t *)(scales + padded * groups * 2)};
}

INLINE __mmask16 lanes_left(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }

/* The largest magnitude of a group, as bits: among magnitudes their order is that of the numbers, and what is not a number comes out on top. */
INLINE float largest(const __m512 x[4]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) most = _mm512_max_epi32(most, _mm512_and_si512((__m512i)x[i], magnitude));
    const uint32_t bits = _mm512_reduce_max_epi32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void load_group(const float *x, int left, __m512 out[4]) {
    for (int i = 0; i < 4; i++) out[i] = _mm512_maskz_loadu_ps(lanes_left(left - 16 * i), x + 16 * i);
}

/* Rounds sixteen numbers to int8, at most 127 in magnitude. */
INLINE __m128i to_int8(__m512 x) {
    return _mm_max_epi8(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)), _mm_set1_epi8(-127));
}

void quantised_prepare(const Operand *x, int first, int last) {
    const int groups = groups_of(x->inputs), width = x->steps * 32;
    for (int row = first; row < last; row++)
        for (int g = 0; g < groups; g++) {
            const size_t place = (size_t)(row / 16) * groups + g;
            int8_t *quants = x->quants + place * TILE_BYTES + row % 16 * GROUP;
            __m512 values[4];
            __m512i sum = _mm512_setzero_si512();
            load_group(x->plain + (size_t)row * width + g * GROUP, width - g * GROUP, values);
            const float most = largest(values);
            const __m512 inverse = _mm512_set1_ps(most == 0.0f ? 0.0f : 127.0f / most);
            for (int i = 0; i < 4; i++) {
                __m128i rounded = to_int8(_mm512_mul_ps(values[i], inverse));
                _mm_store_si128((__m128i *)(quants + 16 * i), rounded);
                sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(rounded));
            }
            x->scales[place * 32 + row % 16] = most / 127.0f;
            ((int32_t *)x->scales)[place * 32 + 16 + row % 16] = -128 * _mm512_reduce_add_epi32(sum);
        }
}

INLINE bf16 to_bf16(float x) {
    return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(x)), 0);
}

/* A group of weights to int8, scaled by the largest; returns the scale. */
INLINE bf16 round_int8(const __m512 x[4], uint8_t *quants) {
    const bf16 scale = to_bf16(largest(x) / 127.0f);
    const __m512 divisor = _mm512_set1_ps(to_float(scale));
    for (int i = 0; i < 4; i++) {
        __m128i rounded = to_int8(_mm512_div_ps(x[i], divisor));
        _mm_storeu_si128((__m128i *)(quants + 16 * i), to_float(scale) == 0.0f ? _mm_setzero_si128() : rounded);
    }
    return scale;
}

/* For each byte -128 .. 127, plus 128, the level nearest to it, the lower of two equally near. */
static void nearest_levels(uint8_t codes[256]) {
    for (int value = -128, code = 0; value < 128; value++) {
        while (code < 15 && value - quantised_levels[code] > quantised_levels[code + 1] - value) code++;
        codes[value + 128] = code;
    }
}

/* A group of weights to sixteen levels. Of eight scales that put the largest weight on different levels at either end, the one whose
levels, each scale then fitted by least squares, come closest. Returns the scale. */
INLINE bf16 round_int4(const __m512 x[4], const uint8_t codes[256], uint8_t *best) {
    static const float fractions[4] = {1.0f, 0.92f, 0.85f, 1.08f};
    const float most = largest(x);
    float best_gain = -1.0f, best_scale = 0.0f;
    memset(best, 8, GROUP);
    if (most == 0.0f) return 0;
    for (int trial = 0; trial < 8; trial++) {
        const float inverse = (trial & 1 ? -124.0f : 124.0f) * fractions[trial / 2] / most;
        uint8_t trial_codes[GROUP];
        __m512 with = _mm512_setzero_ps(), square = _mm512_setzero_ps();
        for (int i = 0; i < 4; i++) {
            __m512i index = _mm512_cvtepi8_epi32(to_int8(_mm512_mul_ps(x[i], _mm512_set1_ps(inverse))));
            index = _mm512_add_epi32(index, _mm512_set1_epi32(128));
            __m512i code = _mm512_and_si512(_mm512_i32gather_epi32(index, codes, 1), _mm512_set1_epi32(15));
            _mm_storeu_si128((__m128i *)(trial_codes + 16 * i), _mm512_cvtepi32_epi8(code));
            __m512 level = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)quantised_levels), _mm512_cvtepi32_epi8(code))));
            with = _mm512_fmadd_ps(x[i], level, with);
            square = _mm512_fmadd_ps(level, level, square);
        }
        const float dot = _mm512_reduce_add_ps(with), length = _mm512_reduce_add_ps(square), gain = dot * (dot / length);
        if (gain > best_gain) best_gain = gain, best_scale = dot / length, memcpy(best, trial_codes, GROUP);
    }
    return to_bf16(best_scale);
}

/* Lays out one group of 16 outputs, quants or codes by output, as a half panel has it. */
INLINE void pack_group(const uint8_t *quants, int format, uint8_t *out) {
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(quants + i * GROUP);
    transpose16(v);
    for (int i = 0; i < (format == FORMAT_INT8 ? 16 : 8); i++) {
        __m512i line = format == FORMAT_INT8 ? v[i] : _mm512_or_si512(v[i], _mm512_slli_epi16(v[i + 8], 4));
        _mm512_storeu_si512(out + 64 * i, line);
    }
}

/* Weights (outputs, inputs), fp32, to panels 0 .. panels - 1: see quantised.h. */
EXPORT void quantised_pack(const float *weights, int outputs, int inputs, int format, uint8_t *values, bf16 *scales) {
    const int groups = groups_of(inputs), halves = (outputs + 31) / 32 * 2, bytes = format == FORMAT_INT8 ? TILE_BYTES : TILE_BYTES / 2;
    uint8_t codes[256 + 4], quants[16 * GROUP];
    nearest_levels(codes);
    for (int half = 0; half < halves; half++)
        for (int g = 0; g < groups; g++, values += bytes, scales += 16) {
            for (int i = 0; i < 16; i++) {
                const int row = half * 16 + i;
                __m512 x[4];
                load_group(weights + (size_t)row * inputs + g * GROUP, row < outputs ? inputs - g * GROUP : 0, x);
                scales[i] = format == FORMAT_INT8 ? round_int8(x, quants + i * GROUP) : round_int4(x, codes, quants + i * GROUP);
            }
            pack_group(quants, format, values);
        }
}

/* For tests: rows (rows, inputs), fp32, times the matrix, panels first .. last - 1, to out (rows, 32 panels). */
EXPORT void quantised_multiply(const Matrix *w, const float *rows, int count, float *out, int first, int last) {
    void *memory = aligned(quantised_operand_bytes(w, count));
    float *room = aligned((size_t)32 * 32 * sizeof(float));
    Operand x;
    quantised_place(&x, w, count, memory);
    memset(x.plain, 0, (size_t)count * w->steps * 32 * sizeof(float));
    for (int r = 0; r < count; r++) memcpy(x.plain + (size_t)r * w->steps * 32, rows + (size_t)r * w->inputs, w->inputs * sizeof(float));
    quantised_prepare(&x, 0, count);
    for (int panel = first; panel < last; panel++)
        for (int row = 0; row < count; row += 32) {
            const int some = count - row < 32 ? count - row : 32;
            quantised_product(w, &x, panel, row, some, room, 32);
            for (int r = 0; r < some; r++) memcpy(out + (size_t)(row + r) * w->panels * 32 + panel * 32, room + r * 32, 32 * sizeof(float));
        }
    release_tiles();
    free(room);
    free(memory);
}
