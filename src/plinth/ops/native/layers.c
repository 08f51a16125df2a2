/* Normalisation, gate and cross-entropy: one pass over memory each. */
#include "lanes.h"

INLINE __mmask16 lanes_from(int i, int n) { return n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1); }

/* total = x + delta (or x), y = total / rms(total), scale = 1 / rms, row by row; delta may be null. */
EXPORT void add_rms_norm_forward(const bf16 *x, const bf16 *delta, bf16 *total, bf16 *y, float *scale, long rows, int D, float eps) {
    for (long r = 0; r < rows; r++, x += D, y += D) {
        const bf16 *sum_row = x;
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < D; i += 16) {
            __mmask16 m = lanes_from(i, D);
            __m512 v = load16_masked(x + i, m);
            if (delta) {
                v = _mm512_add_ps(v, load16_masked(delta + r * D + i, m));
                store16_masked(total + r * D + i, m, v);
                v = load16_masked(total + r * D + i, m);
            }
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        if (delta) sum_row = total + r * D;
        scale[r] = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / D + eps);
        for (int i = 0; i < D; i += 16) {
            __mmask16 m = lanes_from(i, D);
            store16_masked(y + i, m, _mm512_mul_ps(load16_masked(sum_row + i, m), _mm512_set1_ps(scale[r])));
        }
    }
}

/* out = scale (grad_y - y mean(grad_y y)) + grad_total; grad_total may be null. */
EXPORT void add_rms_norm_backward(const bf16 *grad_total, const bf16 *grad_y, const bf16 *y, const float *scale, bf16 *out, long rows, int D) {
    for (long r = 0; r < rows; r++, grad_y += D, y += D, out += D) {
        __m512 dot = _mm512_setzero_ps();
        for (int i = 0; i < D; i += 16) {
            __mmask16 m = lanes_from(i, D);
            dot = _mm512_fmadd_ps(load16_masked(grad_y + i, m), load16_masked(y + i, m), dot);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D), factor = _mm512_set1_ps(scale[r]);
        for (int i = 0; i < D; i += 16) {
            __mmask16 m = lanes_from(i, D);
            __m512 g = _mm512_fnmadd_ps(load16_masked(y + i, m), mean, load16_masked(grad_y + i, m));
            __m512 base = grad_total ? load16_masked(grad_total + r * D + i, m) : _mm512_setzero_ps();
            store16_masked(out + i, m, _mm512_fmadd_ps(g, factor, base));
        }
    }
}

INLINE __m512 sigmoid16(__m512 x) {
    __m512 e = exp2_16(_mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-80.0f)), _mm512_set1_ps(-LOG2E)));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e)); /* good to 1 in 16,384; a division takes longer than all the rest */
}

/* gate_up (rows, 2 F), gate first, to silu(gate) up (rows, F). */
EXPORT void swiglu_forward(const bf16 *gate_up, bf16 *y, long rows, int F) {
    for (long r = 0; r < rows; r++, gate_up += 2 * F, y += F)
        for (int i = 0; i < F; i += 16) {
            __mmask16 m = lanes_from(i, F);
            __m512 gate = load16_masked(gate_up + i, m), up = load16_masked(gate_up + F + i, m);
            store16_masked(y + i, m, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid16(gate)), up));
        }
}

EXPORT void swiglu_backward(const bf16 *gate_up, const bf16 *grad, bf16 *out, long rows, int F) {
    for (long r = 0; r < rows; r++, gate_up += 2 * F, out += 2 * F, grad += F)
        for (int i = 0; i < F; i += 16) {
            __mmask16 m = lanes_from(i, F);
            __m512 gate = load16_masked(gate_up + i, m), up = load16_masked(gate_up + F + i, m), g = load16_masked(grad + i, m);
            __m512 s = sigmoid16(gate), silu = _mm512_mul_ps(gate, s);
            /* silu'(x) = s (1 + x (1 - s)) = s + silu (1 - s) */
            __m512 slope = _mm512_fnmadd_ps(silu, s, _mm512_add_ps(s, silu));
            store16_masked(out + i, m, _mm512_mul_ps(_mm512_mul_ps(g, up), slope));
            store16_masked(out + F + i, m, _mm512_mul_ps(g, silu));
        }
}

/* Replaces each row of logits by the gradient of its cross-entropy, softmax minus one-hot, and gives its loss in nats; a target below 0 counts nothing. */
EXPORT void cross_entropy(bf16 *logits, const int64_t *targets, float *losses, long rows, int V) {
    for (long r = 0; r < rows; r++, logits += V) {
        if (targets[r] < 0) {
            memset(logits, 0, (size_t)V * 2);
            losses[r] = 0.0f;
            continue;
        }
        const float wanted = to_float(logits[targets[r]]);
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int i = 0; i < V; i += 16) {
            __mmask16 m = lanes_from(i, V);
            highest = _mm512_mask_max_ps(highest, m, highest, load16_masked(logits + i, m));
        }
        const float top = _mm512_reduce_max_ps(highest);
        const __m512 factor = _mm512_set1_ps(LOG2E), shift = _mm512_set1_ps(top * LOG2E);
        for (int i = 0; i < V; i += 16) {
            __mmask16 m = lanes_from(i, V);
            sum = _mm512_mask_add_ps(sum, m, sum, exp2_16(_mm512_fmsub_ps(load16_masked(logits + i, m), factor, shift)));
        }
        const float total = _mm512_reduce_add_ps(sum);
        const __m512 lse = _mm512_set1_ps(top * LOG2E + log2f(total));
        losses[r] = top + logf(total) - wanted;
        for (int i = 0; i < V; i += 16) {
            __mmask16 m = lanes_from(i, V);
            store16_masked(logits + i, m, exp2_16(_mm512_fmsub_ps(load16_masked(logits + i, m), factor, lse)));
        }
        const float p = exp2f(wanted * LOG2E - (top * LOG2E + log2f(total))) - 1.0f;
        store16_masked(logits + targets[r], 1, _mm512_set1_ps(p));
    }
}
