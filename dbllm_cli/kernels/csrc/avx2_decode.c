#include "activation.h"
#include "attention.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma")))

TARGET void attention_avx2(const attention_head* head) { attention_any(head); }

TARGET void gated_silu_avx2(float* gate, const float* up, int64_t count) {
    gated_silu(gate, up, count);
}

#endif
