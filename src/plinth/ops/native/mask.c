/* A grammar's mask over logits: one bit a token, tokens whose bit is 0 become minus infinity. */
#include "lanes.h"

EXPORT void add_mask(float *logits, const uint8_t *masks, long rows, int vocab, int mask_bytes) {
    const __m512 never = _mm512_set1_ps(-INFINITY);
    for (long r = 0; r < rows; r++, logits += vocab, masks += mask_bytes) {
        int i = 0;
        for (; i + 16 <= vocab; i += 16) {
            uint16_t bits;
            memcpy(&bits, masks + i / 8, 2);
            if (bits != 0xffff) _mm512_mask_storeu_ps(logits + i, (__mmask16)~bits, never);
        }
        for (; i < vocab; i++)
            if (!(masks[i / 8] >> (i % 8) & 1)) logits[i] = -INFINITY;
    }
}
