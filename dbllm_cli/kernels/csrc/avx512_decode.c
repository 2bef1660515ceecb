#include "activation.h"
#include "attention.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,prefer-vector-width=512")))

TARGET void attention_avx512(const attention_head* head) { attention_any(head); }

TARGET void gated_silu_avx512(float* gate, const float* up, int64_t count) {
    gated_silu(gate, up, count);
}

#endif
