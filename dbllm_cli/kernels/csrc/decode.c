#include "activation.h"
#include "attention.h"

void attention_portable(const attention_head* head) { attention_any(head); }

void gated_silu_portable(float* gate, const float* up, int64_t count) {
    gated_silu(gate, up, count);
}
