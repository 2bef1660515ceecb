#include "attention.h"

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,fma,prefer-vector-width=512"))) void
attention_avx512(const attention_head* head) {
    attention_any(head);
}
#endif
