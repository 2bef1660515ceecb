#include "int8.h"

#include <math.h>
#include <string.h>

#include "fdb.h"
#include "floats.h"

enum { LARGEST = 32767 };

void int8_quantize(const float* x, int64_t in, int16_t* q, float* steps) {
    for (int64_t first = 0; first < in; first += INT8_STRETCH) {
        int64_t last = in < first + INT8_STRETCH ? in : first + INT8_STRETCH;
        float factor, largest = fdb_largest_magnitude(x + first, last - first);
        *steps++ = fdb_step(largest, LARGEST, &factor);
        for (int64_t i = first; i < last; i++)
            q[i] = largest == largest ? (int16_t)lrintf(x[i] * factor) : 0;
    }
}

void int8_rows_portable(const int8_t* const* rows, const int16_t* q, const float* steps, int64_t in,
                        int columns, float* y) {
    int8_plain_rows(rows, q, steps, in, columns, y);
}

void int8_product(int8_rows* multiply, const uint8_t* weight, const int16_t* q, const float* steps,
                  int64_t in, int64_t columns, int64_t rows, int64_t first, int64_t last,
                  float* y) {
    int64_t stretches = int8_stretches(in);
    for (int64_t row = first; row < last; row += INT8_ROWS) {
        const int8_t* from[INT8_ROWS];
        float scales[INT8_ROWS], totals[INT8_COLUMNS * INT8_ROWS];
        int64_t valid = last - row < INT8_ROWS ? last - row : INT8_ROWS;
        for (int64_t r = 0; r < INT8_ROWS; r++) {
            uint16_t half;
            int64_t own = row + (r < valid ? r : 0);
            from[r] = (const int8_t*)weight + own * (in + INT8_SCALE_BYTES);
            memcpy(&half, from[r] + in, sizeof half);
            scales[r] = fdb_from_float16(half);
        }
        for (int64_t c = 0; c < columns;) {
            int count = columns - c >= INT8_COLUMNS ? INT8_COLUMNS : 1;
            multiply(from, q + c * in, steps + c * stretches, in, count, totals);
            for (int64_t i = 0; i < count; i++)
                for (int64_t r = 0; r < valid; r++)
                    y[(c + i) * rows + row + r] = scales[r] * totals[i * INT8_ROWS + r];
            c += count;
        }
    }
}
