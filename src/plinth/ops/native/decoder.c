/* One call of the model: all rows of a batch through all layers, by all threads of a job, phase by phase. */
#include "decoder.h"

enum {
    CACHED_BYTES = 1 << 20, /* of a matrix's first operand: what stays in the second-level cache while panels pass */
    ROWS_EACH = 4,          /* so few are normed by every thread for itself, which takes less time than a meeting */
    CACHED_STEPS = 8        /* of a panel: what stays in the first-level cache while rows pass */
};

/* Takes results of a product, blocks of 32 columns one behind the other, from panel `panel`, of rows row .. row + rows - 1. */
typedef void (*Finish)(const Work *w, const Layer *layer, const float *blocks, int panel, int row, int rows);

/* Where results go: into `blocks`, an array with as many panels as the matrix, on top of what it holds where `add`; or, `together` panels
at a time, to `finish`. */
typedef struct {
    float *blocks;
    int add, together;
    Finish finish;
    const Layer *layer;
} Target;

/* A panel times rows top .. bottom - 1, their results `panels` blocks apart. Many rows take a part of the panel at a time. */
static void multiply_panel(const Matrix *m, const Operand *x, int panel, int top, int bottom, int add, float *out, int panels) {
    float block[32 * 32] __attribute__((aligned(64)));
    if (m->format == FORMAT_BF16) {
        const int parts = bottom - top > 32 ? (m->steps + CACHED_STEPS - 1) / CACHED_STEPS : 1;
        for (int part = 0; part < parts; part++)
            for (int row = top; row < bottom; row += 32)
                product_steps(m, x, panel, row, bottom - row < 32 ? bottom - row : 32, m->steps * part / parts, m->steps * (part + 1) / parts,
                              part == 0 && !add, BLOCK_AT(out, panels, row - top, 0));
        return;
    }
    for (int row = top; row < bottom; row += 32) {
        float *own = BLOCK_AT(out, panels, row - top, 0);
        const int rows = bottom - row < 32 ? bottom - row : 32;
        product(m, x, panel, row, rows, add ? block : own);
        for (int i = 0; add && i < rows * 32; i += 16) _mm512_store_ps(own + i, _mm512_add_ps(_mm512_load_ps(own + i), _mm512_load_ps(block + i)));
    }
}

/* Units first .. last - 1 of a share, where rows are few and reading the weights takes all the time: each thread begins with a long stretch,
and the last quarter goes in short ones to whoever is free. Returns 0 when all have been taken. */
INLINE int stretch(int share, int units, int threads, int *first, int *last) {
    const int large = units * 3 / (4 * threads), small = 1 + units / (32 * threads);
    *first = share < threads ? share * large : threads * large + (share - threads) * small;
    *last = *first + (share < threads ? large : small);
    if (*last > units) *last = units;
    return *first < units;
}

/* A unit, panels whose results go on together, times rows top .. bottom - 1. */
static void multiply_unit(const Work *w, const Matrix *m, const Operand *x, int unit, int top, int bottom, const Target *target, float *partial) {
    if (!target->finish) return multiply_panel(m, x, unit, top, bottom, target->add, BLOCK_AT(target->blocks, m->panels, top, unit), m->panels);
    const int together = target->together;
    for (int i = 0; i < together; i++) multiply_panel(m, x, unit * together + i, top, bottom, 0, partial + 1024 * i, together);
    for (int row = top; row < bottom; row += 32)
        target->finish(w, target->layer, BLOCK_AT(partial, together, row - top, 0), unit * together, row, bottom - row < 32 ? bottom - row : 32);
}

/* All panels times all rows, shared out among the threads. */
static void multiply_all(const Work *w, const Matrix *m, const Operand *x, int rows, const Target *target, int thread) {
    const int units = m->panels / (target->finish ? target->together : 1), threads = w->call->threads;
    float *partial = w->partial + thread * w->partial_floats;
    if (rows <= 32) {
        for (int first, last; stretch(next_share(), units, threads, &first, &last);)
            for (int unit = first; unit < last; unit++) multiply_unit(w, m, x, unit, 0, rows, target, partial);
        return;
    }
    const int deep = round_up(CACHED_BYTES / (m->steps * 64), 32), few = 1 + units / (8 * threads), stretches = (units + few - 1) / few;
    for (int share; (share = next_share()) < stretches * ((rows + deep - 1) / deep);) {
        const int first = share % stretches * few, top = share / stretches * deep, bottom = rows - top < deep ? rows : top + deep;
        for (int unit = first; unit < first + few && unit < units; unit++) multiply_unit(w, m, x, unit, top, bottom, target, partial);
    }
}

INLINE __m512 gated(const float *line) {
    const __m512 gate = _mm512_load_ps(line), up = _mm512_load_ps(line + 16);
    const __m512 e = exp2_16(_mm512_mul_ps(_mm512_max_ps(gate, _mm512_set1_ps(-80.0f)), _mm512_set1_ps(-LOG2E)));
    const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0f), e), rough = _mm512_rcp14_ps(divisor); /* then one step of Newton's */
    const __m512 inverse = _mm512_mul_ps(rough, _mm512_fnmadd_ps(divisor, rough, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(_mm512_mul_ps(gate, inverse), up);
}

/* Two panels of gates and ups give 32 inputs of the next matrix. */
static void put_gated(const Work *w, const Layer *layer, const float *block, int panel, int row, int rows) {
    (void)layer;
    for (int r = 0; r < rows; r++) put32(&w->gated, row + r, panel * 16, gated(block + 32 * r), gated(block + 1024 + 32 * r));
}

static void give_logits(const Work *w, const Layer *layer, const float *block, int panel, int row, int rows) {
    (void)layer;
    const int vocabulary = w->model->head.outputs;
    const float cap = w->model->logit_softcap;
    for (int r = 0; r < rows; r++) {
        float *out = w->call->logits + (size_t)(row + r) * vocabulary;
        for (int i = 0; i < 32 && panel * 32 + i < vocabulary; i += 16) {
            const int room = vocabulary - panel * 32 - i;
            __m512 values = _mm512_load_ps(block + 32 * r + i);
            if (cap > 0) {
                float each[16];
                _mm512_storeu_ps(each, values);
                for (int j = 0; j < 16; j++) each[j] = cap * tanhf(each[j] / cap);
                values = _mm512_loadu_ps(each);
            }
            _mm512_mask_storeu_ps(out + panel * 32 + i, room >= 16 ? 0xffff : (__mmask16)((1u << room) - 1), values);
        }
    }
}

/* A share of n rows: thread's part of whole rows. */
INLINE void part_of(int n, int thread, int threads, int *first, int *last) {
    *first = (int)((long)n * thread / threads);
    *last = (int)((long)n * (thread + 1) / threads);
}

/* The 32 columns from column `column` of a row of the stream. */
INLINE float *stream_at(const Work *w, int row, int column) { return BLOCK_AT(w->stream, w->width / 32, row, column / 32) + row % 32 * 32; }

INLINE __m512 inverse_rms(const Work *w, int row) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < w->width; i += 32) {
        const __m512 low = _mm512_load_ps(stream_at(w, row, i)), high = _mm512_load_ps(stream_at(w, row, i) + 16);
        sum = _mm512_fmadd_ps(high, high, _mm512_fmadd_ps(low, low, sum));
    }
    return _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / w->model->hidden_size + w->model->norm_eps));
}

/* Puts x / rms(x) of a row of the stream, times the scales, times `factor`, into an operand, or into `plain` where there is one. */
INLINE void norm_row(const Work *w, int from, const float *scales, float factor, const Operand *out, int row, float *plain) {
    const __m512 scale = _mm512_mul_ps(inverse_rms(w, from), _mm512_set1_ps(factor));
    for (int i = 0; i < w->width; i += 32) {
        const float *x = stream_at(w, from, i);
        __m512 low = _mm512_mul_ps(_mm512_load_ps(x), scale), high = _mm512_mul_ps(_mm512_load_ps(x + 16), scale);
        if (scales) low = _mm512_mul_ps(low, _mm512_loadu_ps(scales + i)), high = _mm512_mul_ps(high, _mm512_loadu_ps(scales + i + 16));
        if (plain) {
            float both[32];
            _mm512_storeu_ps(both, low), _mm512_storeu_ps(both + 16, high);
            const int room = w->model->hidden_size - i;
            memcpy(plain + i, both, sizeof(float) * (room < 32 ? room : 32));
        } else
            put32(out, row, i, low, high);
    }
}

INLINE void embed_row(const Work *w, int row) {
    float values[w->width];
    matrix_row(&w->model->embed, w->call->tokens[row], values);
    for (int i = 0; i < w->width; i += 32) memcpy(stream_at(w, row, i), values + i, 128);
}

static void norm_rows(const Work *w, const float *scales, int thread) {
    int first = 0, last = w->call->num_rows;
    const int alone = last <= ROWS_EACH;
    if (!alone) part_of(last, thread, w->call->threads, &first, &last);
    for (int r = first; r < last; r++) norm_row(w, r, scales, 1.0f, w->normed + thread, r, NULL);
    prepare(w->normed + thread, first, last);
    if (!alone) meet();
}

/* Quantised formats need whole rows, which several threads have put. */
static void finish_operand(const Work *w, const Operand *x, int thread) {
    int first, last;
    meet();
    if (x->format == FORMAT_BF16) return;
    part_of(w->call->num_rows, thread, w->call->threads, &first, &last);
    prepare(x, first, last);
    meet();
}

static void run_layer(const Work *w, const Layer *layer, int thread) {
    const int rows = w->call->num_rows;
    norm_rows(w, layer->attention_norm, thread);
    multiply_all(w, &layer->qkv, w->normed + thread, rows, &(Target){.finish = take_head, .together = w->model->head_dim / 32, .layer = layer}, thread);
    meet();
    attend_rows(w, layer, thread);
    finish_operand(w, &w->attended, thread);
    multiply_all(w, &layer->out, &w->attended, rows, &(Target){.blocks = w->stream, .add = 1}, thread);
    meet();
    norm_rows(w, layer->mlp_norm, thread);
    multiply_all(w, &layer->gate_up, w->normed + thread, rows, &(Target){.finish = put_gated, .together = 2}, thread);
    finish_operand(w, &w->gated, thread);
    multiply_all(w, &layer->down, &w->gated, rows, &(Target){.blocks = w->stream, .add = 1}, thread);
    meet();
}

static void run_all(void *context, int thread) {
    const Work *w = context;
    const Decoder *m = w->model;
    const Call *c = w->call;
    int first, last;
    part_of(c->num_rows, thread, c->threads, &first, &last);
    for (int r = first; r < last; r++) embed_row(w, r);
    meet();
    for (int i = 0; i < m->num_layers; i++) run_layer(w, m->layers + i, thread);
    part_of(c->num_wanted, thread, c->threads, &first, &last);
    for (int r = first; r < last; r++)
        norm_row(w, c->wanted[r], m->final_norm, m->output_multiplier, &w->last, r,
                 c->hidden ? c->hidden + (size_t)r * m->hidden_size : NULL);
    if (c->logits) {
        prepare(&w->last, first, last);
        meet();
        multiply_all(w, &m->head, &w->last, c->num_wanted, &(Target){.finish = give_logits, .together = 1}, thread);
    }
    release_tiles();
}

/* Whether a row is the next position of the same sequence as the one before it. */
INLINE int goes_on(const Call *c, int r) { return r > 0 && c->sequences[r] == c->sequences[r - 1] && c->positions[r] == c->positions[r - 1] + 1; }

/* Cuts the rows into groups of one sequence that fill a tile. */
static void cut_groups(Work *w) {
    for (int r = 0; r < w->call->num_rows; r++)
        if (goes_on(w->call, r) && w->groups[w->num_groups - 1].rows < TILE / w->heads_a_tile)
            w->groups[w->num_groups - 1].rows++;
        else
            w->groups[w->num_groups++] = (Span){r, 1};
}

/* Cuts every 32 rows into spans that write to one block of the cache. */
static void cut_writes(Work *w) {
    int count = 0;
    for (int r = 0; r < w->call->num_rows; r++) {
        if (r % 32 == 0) w->first_write[r / 32] = count;
        if (goes_on(w->call, r) && r % 32 && w->call->positions[r] % BLOCK)
            w->writes[count - 1].rows++;
        else
            w->writes[count++] = (Span){r, 1};
    }
    w->first_write[(w->call->num_rows + 31) / 32] = count;
}

/* Lays a call's work out in memory from `at`; returns the bytes, and writes nothing where `at` is null. */
static size_t lay_out(const Decoder *m, const Call *c, char *at, Work *w) {
    const int rows = round_up(c->num_rows, 32), wanted = round_up(c->num_wanted, 32), sharing = m->num_heads / m->num_kv_heads;
    const Layer *layer = m->layers;
    *w = (Work){.model = m, .call = c, .width = round_up(m->hidden_size, 32), .heads_a_tile = sharing < TILE ? sharing : TILE};
    for (int r = 0; r < c->num_rows; r++)
        if (c->positions[r] >= w->longest) w->longest = round_up(c->positions[r] + 1, BLOCK);
    size_t used = 0;
#define TAKE(bytes) (used += ((size_t)(bytes) + 127) / 64 * 64, at ? at + used - ((size_t)(bytes) + 127) / 64 * 64 : NULL)
#define TAKE_OPERAND(x, w_, n) \
    { \
        char *memory = TAKE(operand_bytes(w_, n)); \
        if (memory) place_operand(x, w_, n, memory); \
    }
    w->stream = (float *)TAKE((size_t)rows * w->width * 4);
    w->queries = (bf16 *)TAKE((size_t)rows * m->num_heads * m->head_dim * 2);
    w->partial_floats = (size_t)(rows > wanted ? rows : wanted) * (m->head_dim > 64 ? m->head_dim : 64);
    w->partial = (float *)TAKE(w->partial_floats * 4 * c->threads);
    w->groups = (Span *)TAKE(rows * sizeof(Span));
    w->writes = (Span *)TAKE(rows * sizeof(Span));
    w->first_write = (int *)TAKE((rows / 32 + 1) * sizeof(int));
    w->normed = (Operand *)TAKE(c->threads * sizeof(Operand));
    for (int i = 0; i < c->threads; i++)
        if (i == 0 || c->num_rows <= ROWS_EACH)
            TAKE_OPERAND(w->normed + i, &layer->qkv, rows)
        else if (at)
            w->normed[i] = w->normed[0];
    TAKE_OPERAND(&w->attended, &layer->out, rows)
    TAKE_OPERAND(&w->gated, &layer->down, rows)
    TAKE_OPERAND(&w->last, &m->head, wanted)
    w->scratch_bytes = attention_scratch_bytes(m, w->longest) + 64;
    w->scratch_bytes -= w->scratch_bytes % 64;
    w->scratch = TAKE(w->scratch_bytes * c->threads);
    return used;
}

/* Returns the bytes of memory that a call needs. */
EXPORT size_t decoder_bytes(const Decoder *m, const Call *c) {
    Work w;
    return lay_out(m, c, NULL, &w);
}

/* Runs the call: writes keys and values of its rows, and logits or hidden states of those wanted. Returns 0 or an error number. */
EXPORT int decoder_forward(const Decoder *m, const Call *c) {
    Work w;
    lay_out(m, c, c->memory, &w);
    cut_groups(&w);
    cut_writes(&w);
    return run_together(run_all, &w, c->threads);
}
