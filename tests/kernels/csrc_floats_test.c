/* floats.h under sanitizers: every number of both half formats. Built by test_sanitizers.py. */
#include "floats.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define FAIL(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))

typedef struct {
    const char *name;
    float (*widen)(uint16_t);
    uint16_t (*narrow)(float);
    uint16_t infinity;
    double beyond; /* where infinity would stand, had the exponent one more value */
} half_format;

static void check_rounding(const half_format *f, uint16_t code, float value, const char *what) {
    uint16_t positive = f->narrow(value), negative = f->narrow(-value);
    if (positive != code || negative != (code | 0x8000))
        FAIL("%s: %a, %s, is %04x and negated %04x, not %04x", f->name, value, what, positive,
             negative, code);
}

/* Every number, the middle between it and the next, and the floats around the middle. */
static void check_half_format(const half_format *f) {
    for (uint16_t code = 0; code < f->infinity; code++) {
        float here = f->widen(code);
        double next = code + 1 == f->infinity ? f->beyond : f->widen((uint16_t)(code + 1));
        float middle = (float)((here + next) / 2);
        uint16_t even = (uint16_t)(code + (code & 1));
        if (!(here < next)) FAIL("%s: %04x is not below the next", f->name, code);
        check_rounding(f, code, here, "a number");
        check_rounding(f, even, middle, "a middle");
        check_rounding(f, code, nextafterf(middle, 0), "below a middle");
        check_rounding(f, (uint16_t)(code + 1), nextafterf(middle, INFINITY), "above a middle");
    }
    check_rounding(f, f->infinity, INFINITY, "infinity");
    if (f->widen(f->infinity) != INFINITY || !isnan(f->widen((uint16_t)(f->infinity + 1))))
        FAIL("%s: infinity or NaN is read as another number", f->name);
    if (!isnan(f->widen(f->narrow(NAN))) || !isnan(f->widen(f->narrow(-NAN))))
        FAIL("%s: NaN becomes a number", f->name);
}

int main(void) {
    const half_format formats[] = {
        {"bfloat16", fdb_from_bfloat16, fdb_to_bfloat16, 0x7f80, 0x1p128},
        {"float16", fdb_from_float16, fdb_to_float16, 0x7c00, 65536},
    };
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) check_half_format(&formats[i]);
    return 0;
}
