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

void int8_sums_portable(const int8_t* const* rows, const int16_t* q, int64_t stride, int64_t count,
                        int columns, int32_t* sums) {
    int8_plain_sums(rows, q, stride, count, columns, sums);
}

/* `valid` rows for `count` columns. */
static void add_rows(int8_sums* sum, const int8_t* const* from, const float* scales,
                     const int16_t* q, const float* steps, int64_t in, int count, int64_t valid,
                     float* y, int64_t y_stride) {
    int64_t stretches = (in + INT8_STRETCH - 1) / INT8_STRETCH;
    float totals[INT8_COLUMNS * INT8_ROWS] = {0};
    for (int64_t s = 0; s < stretches; s++) {
        int64_t at = s * INT8_STRETCH, inputs = in - at < INT8_STRETCH ? in - at : INT8_STRETCH;
        const int8_t* rows[INT8_ROWS] = {from[0] + at, from[1] + at, from[2] + at, from[3] + at};
        int32_t sums[INT8_COLUMNS * INT8_ROWS];
        sum(rows, q + at, in, inputs, count, sums);
        for (int c = 0; c < count; c++)
            for (int r = 0; r < INT8_ROWS; r++)
                totals[c * INT8_ROWS + r] +=
                    steps[c * stretches + s] * (float)sums[c * INT8_ROWS + r];
    }
    for (int c = 0; c < count; c++)
        for (int64_t r = 0; r < valid; r++)
            y[c * y_stride + r] = scales[r] * totals[c * INT8_ROWS + r];
}

void int8_product(int8_sums* sums, const uint8_t* weight, const int16_t* q, const float* steps,
                  int64_t in, int64_t columns, int64_t rows, int64_t first, int64_t last,
                  float* y) {
    int64_t stretches = (in + INT8_STRETCH - 1) / INT8_STRETCH;
    for (int64_t row = first; row < last; row += INT8_ROWS) {
        const int8_t* from[INT8_ROWS];
        float scales[INT8_ROWS];
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
            add_rows(sums, from, scales, q + c * in, steps + c * stretches, in, count, valid,
                     y + c * rows + row, rows);
            c += count;
        }
    }
}
