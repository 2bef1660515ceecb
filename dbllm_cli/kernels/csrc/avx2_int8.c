#include "int8.h"

#if defined(__x86_64__)

__attribute__((target("avx2"))) void int8_rows_avx2(const int8_t* const* rows, const int16_t* q,
                                                    const float* steps, int64_t in, int columns,
                                                    float* y) {
    int8_plain_rows(rows, q, steps, in, columns, y);
}

#endif
