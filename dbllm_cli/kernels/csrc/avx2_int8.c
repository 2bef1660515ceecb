#include "int8.h"

#if defined(__x86_64__)

__attribute__((target("avx2"))) void int8_sums_avx2(const int8_t* const* rows, const int16_t* q,
                                                    int64_t stride, int64_t count, int columns,
                                                    int32_t* sums) {
    int8_plain_sums(rows, q, stride, count, columns, sums);
}

#endif
