/* Chooses one token in each row of logits. A row is read by one thread in one fixed order, so its answer never depends on the others. */
#include "lanes.h"
#include <float.h>

#define CHUNK 1024 /* weights added in single precision before they join a double */
#define NARROW 128 /* entries that are ranked one by one */
#define BLOCK 64   /* logits whose largest is noted, to find the k-th largest without sorting */

enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, NOISE, OPTIONS };

/* What a row needs while it is worked on; V of each. `keys` and `loads` are permuted by `reaching`, the others stay in order of ids. */
typedef struct {
    float *values, *weights, *loads, *maxima;
    int32_t *ids;
    uint64_t *keys;
    double *sums;
} scratch;

/* Weight of a logit: 2^((x - top) * scale), 1 at the largest; error 2e-7. */
typedef struct {
    float top, scale;
} curve;

/* 2^x for x <= 0 to the precision of a float; NaN stays NaN, and below 2^-200 nothing is left. */
INLINE __m512 exp2_exact16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.540353039e-4f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.333355815e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.618129108e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.550410866e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.402265070e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.931471806e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

INLINE __mmask16 lanes_until(int i, int end) { return end - i >= 16 ? 0xffff : (__mmask16)((1u << (end - i)) - 1); }

INLINE __m512 weigh16(__m512 x, curve c) {
    return exp2_exact16(_mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(c.top)), _mm512_set1_ps(c.scale)));
}

static float largest(const float *x, int begin, int end) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 first = nothing, second = nothing;
    for (int i = begin; i < end; i += 32) {
        first = _mm512_max_ps(_mm512_mask_loadu_ps(nothing, lanes_until(i, end), x + i), first);
        if (i + 16 < end) second = _mm512_max_ps(_mm512_mask_loadu_ps(nothing, lanes_until(i + 16, end), x + i + 16), second);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(first, second));
}

static float smallest(const float *x, int n) {
    __m512 least = _mm512_set1_ps(INFINITY);
    for (int i = 0; i < n; i += 16) least = _mm512_min_ps(_mm512_mask_loadu_ps(least, lanes_until(i, n), x + i), least);
    return _mm512_reduce_min_ps(least);
}

/* Sum of the weights of x[begin..end) that are at least `floor`. */
static float weight_sum(const float *x, int begin, int end, curve c, float floor) {
    __m512 sum = _mm512_setzero_ps();
    const __m512 least = _mm512_set1_ps(floor);
    for (int i = begin; i < end; i += 16) {
        __mmask16 m = lanes_until(i, end);
        __m512 w = weigh16(_mm512_maskz_loadu_ps(m, x + i), c);
        m = _mm512_mask_cmp_ps_mask(m, w, least, _CMP_NLT_UQ); /* keeps NaN, so that a damaged row shows */
        sum = _mm512_mask_add_ps(sum, m, sum, w);
    }
    return _mm512_reduce_add_ps(sum);
}

/* The place of the largest logit, the first among equals, or -1 where all are -inf; and the logarithm of the sum of exponentials. */
EXPORT void peak_rows(const float *logits, long N, int V, int64_t *best, float *log_sums) {
    for (long r = 0; r < N; r++) {
        const float *x = logits + r * V;
        float top = -INFINITY;
        double total = 0.0;
        int at = -1;
        for (int begin = 0; begin < V; begin += CHUNK) {
            const int end = begin + CHUNK < V ? begin + CHUNK : V;
            const float chunk_top = largest(x, begin, end);
            const curve c = {chunk_top > -INFINITY ? chunk_top : 0.0f, LOG2E};
            const double sum = weight_sum(x, begin, end, c, 0.0f);
            if (chunk_top > top) {
                total = total * exp((double)top - chunk_top) + sum;
                top = chunk_top;
                at = begin;
            } else if (sum > 0.0 || sum != sum) {
                total += sum * exp((double)c.top - (top > -INFINITY ? top : 0.0f));
            }
        }
        while (at >= 0 && x[at] != top) at++;
        best[r] = at;
        log_sums[r] = (float)(top + log(total));
    }
}

/* A number that rises with the value and, among equals, falls with the id; no two of a row are the same. */
INLINE uint64_t rank_key(float value, uint32_t id) {
    uint32_t bits;
    value += 0.0f; /* -0 and 0 are equals */
    memcpy(&bits, &value, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - id);
}

INLINE void swap_entries(uint64_t *keys, float *loads, int i, int j) {
    const uint64_t key = keys[i];
    const float load = loads[i];
    keys[i] = keys[j], loads[i] = loads[j];
    keys[j] = key, loads[j] = load;
}

INLINE int middle(const uint64_t *k, int a, int b, int c) {
    if (k[a] < k[b]) return k[b] < k[c] ? b : k[a] < k[c] ? c : a;
    return k[a] < k[c] ? a : k[b] < k[c] ? c : b;
}

/* The largest key such that the loads of all keys from it upwards reach `need`; the smallest key where they never do. Permutes. */
static uint64_t reaching(uint64_t *keys, float *loads, int n, double need) {
    double above = 0.0;
    uint64_t least = UINT64_MAX;
    for (int low = 0, high = n; low < high;) {
        swap_entries(keys, loads, low, middle(keys, low, low + (high - low) / 2, high - 1));
        const uint64_t pivot = keys[low];
        int end = low + 1; /* behind the pivot: those above it */
        double sum = 0.0;
        for (int i = low + 1; i < high; i++) {
            if (keys[i] > pivot) {
                sum += loads[i];
                swap_entries(keys, loads, i, end++);
            }
        }
        if (end > low + 1 && above + sum >= need) {
            low++;
            high = end;
            continue;
        }
        above += sum + loads[low];
        least = pivot;
        if (above >= need) return pivot;
        low = end;
    }
    return least;
}

/* Lists the logits that are at least `cut` and not -inf, in order of ids. */
static int collect(const float *x, int V, float cut, scratch s) {
    const __m512 least = _mm512_set1_ps(cut > -FLT_MAX ? cut : -FLT_MAX);
    __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int n = 0;
    for (int i = 0; i < V; i += 16, ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16))) {
        __mmask16 m = lanes_until(i, V);
        const __m512 v = _mm512_maskz_loadu_ps(m, x + i);
        m = _mm512_mask_cmp_ps_mask(m, v, least, _CMP_GE_OQ);
        if (!m) continue;
        _mm512_mask_compressstoreu_ps(s.values + n, m, v);
        _mm512_mask_compressstoreu_epi32(s.ids + n, m, ids);
        n += __builtin_popcount(m);
    }
    return n;
}

static float sum_of(const float *weights, int begin, int end) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = begin; i < end; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes_until(i, end), weights + i));
    return _mm512_reduce_add_ps(sum);
}

static double total_of(const float *weights, int n) {
    double total = 0.0;
    for (int i = 0; i < n; i += CHUNK) total += sum_of(weights, i, i + CHUNK < n ? i + CHUNK : n);
    return total;
}

static double weigh(int n, curve c, scratch s) {
    for (int i = 0; i < n; i += 16) {
        const __mmask16 m = lanes_until(i, n);
        _mm512_mask_storeu_ps(s.weights + i, m, weigh16(_mm512_maskz_loadu_ps(m, s.values + i), c));
    }
    return total_of(s.weights, n);
}

/* Keeps the listed entries with a bit in what `test` gives for (numbers, ids). */
#define KEEP(n, test)                                                            \
    int kept = 0;                                                                \
    for (int i = 0; i < n; i += 16) {                                            \
        __mmask16 m = lanes_until(i, n);                                         \
        const __m512i ids = _mm512_maskz_loadu_epi32(m, s.ids + i);              \
        const __m512 values = _mm512_maskz_loadu_ps(m, s.values + i);            \
        const __m512 weights = _mm512_maskz_loadu_ps(m, s.weights + i);          \
        m &= test;                                                               \
        _mm512_mask_compressstoreu_epi32(s.ids + kept, m, ids);                  \
        _mm512_mask_compressstoreu_ps(s.values + kept, m, values);               \
        _mm512_mask_compressstoreu_ps(s.weights + kept, m, weights);             \
        kept += __builtin_popcount(m);                                           \
    }                                                                            \
    return kept

/* Keeps the entries whose key by the numbers `by`, which may be the values themselves, is at least `key`. */
static int keep_from(uint64_t key, const float *by, int n, scratch s) {
    uint32_t bits = (uint32_t)(key >> 32);
    float least;
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    memcpy(&least, &bits, 4);
    const __m512 edge = _mm512_set1_ps(least);
    const __m512i last = _mm512_set1_epi32((int)(0xffffffffu - (uint32_t)key));
    KEEP(n, _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(m, by + i), edge, _CMP_GT_OQ) |
                (_mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(m, by + i), edge, _CMP_EQ_OQ) & _mm512_cmple_epu32_mask(ids, last)));
}

static int keep_heavy(float floor, int n, scratch s) {
    KEEP(n, _mm512_cmp_ps_mask(weights, _mm512_set1_ps(floor), _CMP_GE_OQ));
}

/* The sum of the loads (1 each for NULL) of entries with a number of at least `cut`, and how many they are. */
static double load_from(const float *by, const float *loads, int n, float cut, int *count) {
    const __m512 least = _mm512_set1_ps(cut), one = _mm512_set1_ps(1.0f);
    double total = 0.0;
    *count = 0;
    for (int begin = 0; begin < n; begin += CHUNK) {
        const int end = begin + CHUNK < n ? begin + CHUNK : n;
        __m512 sum = _mm512_setzero_ps();
        for (int i = begin; i < end; i += 16) {
            __mmask16 m = lanes_until(i, end);
            m = _mm512_mask_cmp_ps_mask(m, _mm512_maskz_loadu_ps(m, by + i), least, _CMP_GE_OQ);
            *count += __builtin_popcount(m);
            sum = _mm512_mask_add_ps(sum, m, sum, loads ? _mm512_maskz_loadu_ps(m, loads + i) : one);
        }
        total += _mm512_reduce_add_ps(sum);
    }
    return total;
}

/* Keeps the entries with the largest numbers `by`, the fewest whose loads (1 each for NULL) reach `need`.
 * Bisection by value first, one vector pass a step; the few that are left between the two bounds are ranked. */
static int keep_largest(const float *by, const float *loads, double need, int n, scratch s) {
    float low = -FLT_MAX, high = INFINITY;
    double above = 0.0;
    int inside = n, beyond = 0;
    if (n > NARROW) low = smallest(by, n), high = nextafterf(largest(by, 0, n), INFINITY);
    for (int step = 0; step < 64 && inside > NARROW; step++) {
        const float middle = low + (high - low) * 0.5f;
        if (!(middle > low && middle < high)) break;
        int count;
        const double reached = load_from(by, loads, n, middle, &count);
        if (reached >= need) {
            low = middle;
            inside = count - beyond;
        } else {
            inside -= count - beyond;
            high = middle, above = reached, beyond = count;
        }
    }
    int listed = 0;
    for (int i = 0; i < n; i++) {
        if (!(by[i] >= low && by[i] < high)) continue;
        s.keys[listed] = rank_key(by[i], s.ids[i]);
        s.loads[listed++] = loads ? loads[i] : 1.0f;
    }
    return keep_from(listed ? reaching(s.keys, s.loads, listed, need - above) : 0, by, n, s);
}

/* Lists the k largest logits. At least k of them are no less than the k-th largest of the blocks' largest. */
static int list_top(const float *x, int V, int k, scratch s) {
    const int blocks = (V + BLOCK - 1) / BLOCK;
    float cut = -FLT_MAX;
    if (k <= blocks) {
        for (int b = 0; b < blocks; b++) {
            s.maxima[b] = largest(x, b * BLOCK, b * BLOCK + BLOCK < V ? b * BLOCK + BLOCK : V);
            s.keys[b] = rank_key(s.maxima[b], b), s.loads[b] = 1.0f;
        }
        const uint64_t key = reaching(s.keys, s.loads, blocks, k);
        cut = s.maxima[0xffffffffu - (uint32_t)key];
    }
    const int n = collect(x, V, cut, s);
    return n <= k ? n : keep_largest(s.values, NULL, k, n, s);
}

/* Lists logits that hold the nucleus of mass `share`. Those lighter than (1 - share) / V of the total hold together less than the rest. */
static int list_nucleus(const float *x, int V, double share, curve c, scratch s) {
    double total = 0.0, reached = 0.0;
    for (int begin = 0; begin < V; begin += CHUNK) total += weight_sum(x, begin, begin + CHUNK < V ? begin + CHUNK : V, c, 0.0f);
    const double parts[] = {64.0, 1024.0, 2.0 * V};
    int n = 0;
    for (int i = 0; i < 4 && !(reached >= share * total); i++) {
        const double least = i < 3 ? fmin((1.0 - share) * total / parts[i], 0.5) : 0.0;
        n = collect(x, V, least > 0.0 ? c.top + (float)(log2(least) / c.scale) : -FLT_MAX, s);
        reached = weigh(n, c, s);
    }
    return keep_largest(s.values, s.weights, share * total, n, s);
}

/* Keeps the tokens whose surprise is nearest to the expected one until their mass is `share`. */
static int keep_typical(int n, double share, curve c, scratch s) {
    const double total = weigh(n, c, s), nats = (double)c.scale / LOG2E;
    double mean = 0.0;
    for (int i = 0; i < n; i++) mean += s.weights[i] / total * (c.top - (double)s.values[i]) * nats;
    /* surprise and its mean, the entropy, share the term log(total), which falls out of their difference */
    for (int i = 0; i < n; i++) s.maxima[i] = -(float)fabs((c.top - (double)s.values[i]) * nats - mean);
    return keep_largest(s.maxima, s.weights, share * total, n, s);
}

static int64_t draw_listed(int n, double noise, scratch s) {
    const double target = noise * total_of(s.weights, n);
    double passed = 0.0;
    int last = -1, begin = 0;
    for (; begin + CHUNK < n; begin += CHUNK) {
        const double sum = sum_of(s.weights, begin, begin + CHUNK);
        if (passed + sum > target) break;
        passed += sum;
    }
    for (int i = begin; i < n; i++) {
        if (!(s.weights[i] > 0.0f)) continue;
        last = i;
        passed += s.weights[i];
        if (passed > target) break;
    }
    for (int i = begin; last < 0 && --i >= 0;) last = s.weights[i] > 0.0f ? i : -1;
    return last < 0 ? -1 : s.ids[last];
}

static int64_t draw_all(const float *x, int V, double noise, curve c, float floor, scratch s) {
    double total = 0.0, passed = 0.0;
    const int chunks = (V + CHUNK - 1) / CHUNK;
    for (int i = 0; i < chunks; i++) total += s.sums[i] = weight_sum(x, i * CHUNK, (i + 1) * CHUNK < V ? (i + 1) * CHUNK : V, c, floor);
    int chosen = -1;
    for (int i = 0; i < chunks; i++) {
        if (s.sums[i] > 0.0) chosen = i;
        if (passed + s.sums[i] > noise * total) break;
        passed += s.sums[i];
    }
    if (chosen < 0) return -1;
    passed = 0.0;
    for (int i = 0; i < chosen; i++) passed += s.sums[i];
    const int begin = chosen * CHUNK, end = begin + CHUNK < V ? begin + CHUNK : V;
    int64_t last = -1;
    for (int i = begin; i < end; i += 16) {
        const __mmask16 m = lanes_until(i, end);
        float w[16];
        _mm512_storeu_ps(w, _mm512_maskz_mov_ps(m, weigh16(_mm512_maskz_loadu_ps(m, x + i), c)));
        for (int j = 0; j < 16 && i + j < end; j++) {
            if (!(w[j] >= floor) || !(w[j] > 0.0f)) continue;
            last = i + j;
            passed += w[j];
            if (passed > noise * total) return last;
        }
    }
    return last; /* sums of a chunk and of its numbers one by one differ by rounding */
}

static int64_t choose(const float *x, int V, const double *o, scratch s) {
    const float top = largest(x, 0, V);
    if (!(top > -INFINITY)) return -1;
    if (o[TEMPERATURE] == 0.0) {
        int at = 0;
        while (x[at] != top) at++;
        return at;
    }
    const curve c = {top, (float)(LOG2E / fmax(o[TEMPERATURE], 1e-30))};
    const int by_k = o[TOP_K] < V, by_p = o[TOP_P] < 1.0, by_type = o[TYPICAL_P] < 1.0;
    if (!by_k && !by_p && !by_type) return draw_all(x, V, o[NOISE], c, (float)o[MIN_P], s);
    int n;
    if (by_k) {
        n = list_top(x, V, (int)o[TOP_K], s);
        const double total = weigh(n, c, s);
        if (by_p) n = keep_largest(s.values, s.weights, o[TOP_P] * total, n, s);
    } else if (by_p) {
        n = list_nucleus(x, V, o[TOP_P], c, s);
    } else {
        n = collect(x, V, -FLT_MAX, s);
        weigh(n, c, s);
    }
    if (o[MIN_P] > 0.0) n = keep_heavy((float)o[MIN_P], n, s);
    if (by_type) n = keep_typical(n, o[TYPICAL_P], c, s);
    return draw_listed(n, o[NOISE], s);
}

static scratch new_scratch(int V) {
    const size_t n = (size_t)V + 64;
    scratch s = {aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 8), aligned(n * 8)};
    return s;
}

static void free_scratch(scratch s) {
    free(s.values), free(s.weights), free(s.loads), free(s.maxima), free(s.ids), free(s.keys), free(s.sums);
}

/* Chooses a token for each of M rows by `options`, (M, 6) doubles in the order of the enum; -1 where all logits are -inf or NaN. */
EXPORT void choose_rows(const float *logits, const int64_t *rows, long M, int V, const double *options, int64_t *tokens) {
    scratch s = new_scratch(V);
    for (long m = 0; m < M; m++) tokens[m] = choose(logits + rows[m] * V, V, options + m * OPTIONS, s);
    free_scratch(s);
}

static int descending(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The ids of the `count` largest logits a row, largest first, the lower id first among equals. */
EXPORT void top_rows(const float *logits, long N, int V, int count, int64_t *ids) {
    scratch s = new_scratch(V);
    for (long r = 0; r < N; r++) {
        const int n = list_top(logits + r * V, V, count, s);
        for (int i = 0; i < n; i++) s.keys[i] = rank_key(s.values[i], s.ids[i]);
        qsort(s.keys, n, sizeof(uint64_t), descending);
        for (int i = 0; i < count; i++) ids[r * count + i] = i < n ? (int64_t)(0xffffffffu - (uint32_t)s.keys[i]) : -1;
    }
    free_scratch(s);
}
