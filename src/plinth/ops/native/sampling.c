/* Chooses one token in each row of logits. A row is read by one thread in one fixed order, so its answer never depends on the others. */
#include "lanes.h"
#include "pool.h"
#include <float.h>

#define CHUNK 1024 /* weights added in single precision before they join a double */
#define NARROW 128 /* entries that are ranked one by one */
#define GROUP 16   /* logits, sixteen apart, whose largest is noted, to find the k-th largest without sorting */

enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, NOISE, OPTIONS };

/* What a row needs while it is worked on; V of each. `keys` and `loads` are permuted by `reaching`, the others stay in order of ids. */
typedef struct {
    float *values, *weights, *loads, *maxima, *masked;
    int32_t *ids;
    uint64_t *keys;
    double *sums;
} scratch;

/* Weight of a logit: 2^((x - top) * scale), 1 at the largest; error 2e-7. */
typedef struct {
    float top, scale;
} curve;

/* 2^x for x <= 0, error 1e-7; NaN stays NaN, and below 2^-126 nothing is left. Adding 1.5 * 2^23 rounds to whole numbers; the
 * polynomial is the one of least error for the rest. */
INLINE __m512 exp2_exact16(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912.0f);
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 whole = _mm512_sub_ps(_mm512_add_ps(x, shift), shift), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.3276471e-3f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6755413e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5507133e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022120e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314697e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, y, whole);
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

/* Sum of the weights of x[begin..end). */
static float weight_sum(const float *x, int begin, int end, curve c) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    int i = begin;
    for (; i + 32 <= end; i += 32) {
        first = _mm512_add_ps(first, weigh16(_mm512_loadu_ps(x + i), c));
        second = _mm512_add_ps(second, weigh16(_mm512_loadu_ps(x + i + 16), c));
    }
    for (; i < end; i += 16) {
        const __mmask16 m = lanes_until(i, end);
        first = _mm512_mask_add_ps(first, m, first, weigh16(_mm512_maskz_loadu_ps(m, x + i), c));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(first, second));
}

/* The place of the largest logit, the first among equals, or -1 where all are -inf; and the logarithm of the sum of exponentials. */
static void find_peak(const float *x, int V, int64_t *best, float *log_sum) {
    float top = -INFINITY;
    double total = 0.0;
    int at = -1;
    for (int begin = 0; begin < V; begin += CHUNK) {
        const int end = begin + CHUNK < V ? begin + CHUNK : V;
        const float chunk_top = largest(x, begin, end);
        const curve c = {chunk_top > -INFINITY ? chunk_top : 0.0f, LOG2E};
        const double sum = weight_sum(x, begin, end, c);
        if (chunk_top > top) {
            total = total * exp((double)top - chunk_top) + sum;
            top = chunk_top;
            at = begin;
        } else if (sum > 0.0 || sum != sum) {
            total += sum * exp((double)c.top - (top > -INFINITY ? top : 0.0f));
        }
    }
    while (at >= 0 && x[at] != top) at++;
    *best = at;
    *log_sum = (float)(top + log(total));
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

/* A number that at least k of the logits reach, and not many more: the maxima of groups of logits are searched for it by bisection. */
static float cut_for(const float *x, int V, int k, scratch s) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    int groups = 0;
    for (int begin = 0; begin < V; begin += 16 * GROUP, groups += 16) {
        const int end = begin + 16 * GROUP < V ? begin + 16 * GROUP : V;
        __m512 most = nothing;
        for (int i = begin; i < end; i += 16) most = _mm512_max_ps(_mm512_mask_loadu_ps(nothing, lanes_until(i, end), x + i), most);
        _mm512_storeu_ps(s.maxima + groups, most);
    }
    float low = -FLT_MAX, high = largest(s.maxima, 0, groups);
    int reached;
    load_from(s.maxima, NULL, groups, low, &reached);
    if (reached < k) return -FLT_MAX;
    low = smallest(s.maxima, groups) > low ? smallest(s.maxima, groups) : low;
    for (int step = 0; step < 40 && reached > k + k / 4 + 8; step++) {
        const float middle = low + (high - low) * 0.5f;
        int count;
        if (!(middle > low && middle < high)) break;
        load_from(s.maxima, NULL, groups, middle, &count);
        if (count >= k)
            low = middle, reached = count;
        else
            high = middle;
    }
    return low;
}

static int list_top(const float *x, int V, int k, scratch s) {
    const int n = collect(x, V, cut_for(x, V, k, s), s);
    return n <= k ? n : keep_largest(s.values, NULL, k, n, s);
}

/* Lists logits that hold the nucleus of mass `share`. Those lighter than (1 - share) / V of the total hold together less than the rest. */
static int list_nucleus(const float *x, int V, double share, curve c, scratch s) {
    double total = 0.0, reached = 0.0;
    for (int begin = 0; begin < V; begin += CHUNK) total += weight_sum(x, begin, begin + CHUNK < V ? begin + CHUNK : V, c);
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

static int64_t draw_all(const float *x, int V, double noise, curve c, scratch s) {
    double total = 0.0, passed = 0.0;
    const int chunks = (V + CHUNK - 1) / CHUNK;
    for (int i = 0; i < chunks; i++) total += s.sums[i] = weight_sum(x, i * CHUNK, (i + 1) * CHUNK < V ? (i + 1) * CHUNK : V, c);
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
            if (!(w[j] > 0.0f)) continue;
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
    if (!by_k && !by_p && !by_type && o[MIN_P] == 0.0) return draw_all(x, V, o[NOISE], c, s);
    int n;
    if (by_k) {
        n = list_top(x, V, (int)o[TOP_K], s);
        const double total = weigh(n, c, s);
        if (by_p) n = keep_largest(s.values, s.weights, o[TOP_P] * total, n, s);
    } else if (by_p) {
        n = list_nucleus(x, V, o[TOP_P], c, s);
    } else {
        const double least = 0.999 * o[MIN_P]; /* the weights themselves are compared below */
        n = collect(x, V, least > 0.0 ? top + (float)(log2(least) / c.scale) : -FLT_MAX, s);
        weigh(n, c, s);
    }
    if (o[MIN_P] > 0.0) n = keep_heavy((float)o[MIN_P], n, s);
    if (by_type) n = keep_typical(n, o[TYPICAL_P], c, s);
    return draw_listed(n, o[NOISE], s);
}

static scratch new_scratch(int V) {
    const size_t n = (size_t)V + 64;
    scratch s = {aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 4), aligned(n * 8), aligned(n * 8)};
    return s;
}

static void free_scratch(scratch s) {
    free(s.values), free(s.weights), free(s.loads), free(s.maxima), free(s.masked), free(s.ids), free(s.keys), free(s.sums);
}

typedef struct {
    const float *logits;
    const int64_t *rows;
    const uint8_t *const *masks;
    const double *options;
    int64_t *tokens;
    float *log_sums;
    int num_rows, V, count;
} job;

static void find_peaks(void *context, int thread) {
    const job *j = context;
    (void)thread;
    for (int r; (r = next_share()) < j->num_rows;) find_peak(j->logits + (size_t)r * j->V, j->V, j->tokens + r, j->log_sums + r);
}

/* Copies a row with -inf where the mask's bit is 0: bit i % 8 of byte i / 8 belongs to token i. */
static const float *masked(const float *x, int V, const uint8_t *mask, float *copy) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < V; i += 16) {
        const __mmask16 m = lanes_until(i, V);
        const unsigned allowed = mask[i / 8] | (V - i > 8 ? (unsigned)mask[i / 8 + 1] << 8 : 0);
        _mm512_mask_storeu_ps(copy + i, m, _mm512_mask_loadu_ps(nothing, m & (__mmask16)allowed, x + i));
    }
    return copy;
}

static void choose_all(void *context, int thread) {
    const job *j = context;
    (void)thread;
    scratch s = new_scratch(j->V);
    for (int r; (r = next_share()) < j->num_rows;) {
        const float *x = j->logits + j->rows[r] * j->V;
        if (j->masks && j->masks[r]) x = masked(x, j->V, j->masks[r], s.masked);
        j->tokens[r] = choose(x, j->V, j->options + r * OPTIONS, s);
    }
    free_scratch(s);
}

static int descending(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void list_largest(void *context, int thread) {
    const job *j = context;
    (void)thread;
    scratch s = new_scratch(j->V);
    for (int r; (r = next_share()) < j->num_rows;) {
        const int n = list_top(j->logits + (size_t)r * j->V, j->V, j->count, s);
        for (int i = 0; i < n; i++) s.keys[i] = rank_key(s.values[i], s.ids[i]);
        qsort(s.keys, n, sizeof(uint64_t), descending);
        for (int i = 0; i < j->count; i++) j->tokens[r * j->count + i] = i < n ? (int64_t)(0xffffffffu - (uint32_t)s.keys[i]) : -1;
    }
    free_scratch(s);
}

static void run(void (*work)(void *, int), job *j, int threads) {
    if (run_together(work, j, threads < j->num_rows ? threads : j->num_rows)) run_together(work, j, 1);
}

/* The peak and the logarithm of the sum of exponentials of each of N rows. */
EXPORT void peak_rows(const float *logits, int N, int V, int64_t *best, float *log_sums, int threads) {
    if (N) run(find_peaks, &(job){.logits = logits, .tokens = best, .log_sums = log_sums, .num_rows = N, .V = V}, threads);
}

/* Chooses a token for each of M rows by `options`, (M, 6) doubles in the order of the enum; -1 where all logits are -inf or NaN.
 * masks: NULL, or for each of them NULL or a bit a token, 0 for those that may not be chosen. */
EXPORT void choose_rows(const float *logits, const int64_t *rows, const uint8_t *const *masks, int M, int V, const double *options,
                        int64_t *tokens, int threads) {
    if (M)
        run(choose_all, &(job){.logits = logits, .rows = rows, .masks = masks, .options = options, .tokens = tokens, .num_rows = M, .V = V}, threads);
}

/* The ids of the `count` largest logits a row, largest first, the lower id first among equals. */
EXPORT void top_rows(const float *logits, int N, int V, int count, int64_t *ids, int threads) {
    if (N) run(list_largest, &(job){.logits = logits, .tokens = ids, .num_rows = N, .V = V, .count = count}, threads);
}
