#include "attention.h"

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void attention_avx2(const attention_head* head) {
    attention_any(head);
}
#endif
