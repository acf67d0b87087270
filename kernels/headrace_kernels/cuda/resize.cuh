// The taps of a bilinear resize along one axis, half-pixel centres, as Pillow has them: the triangle is as wide as a pixel of the result
// where that is the larger one and `antialias` is set, else as a pixel of the source; taps beyond the edge are left out, and what is
// left is divided by its sum.
#pragma once

// Tap i, of `count`, is source pixel first + i, at distance |i - centre| in pixels of the source.
struct Span { int first; int count; float centre; float inverse; };

DEVICE Span span(int index, int size, int from, int antialias) {
    // In fp64: an fp32 centre is off by a thousandth of a pixel at 8,192 pixels.
    double scale = (double)from / size;
    double support = antialias && scale > 1.0 ? scale : 1.0;
    double centre = (index + 0.5) * scale;
    int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
    low = low < 0 || centre - support + 0.5 < 0 ? 0 : low;
    high = high > from ? from : high;
    Span result = {low, high - low, (float)(centre - 0.5 - low), (float)(1.0 / support)};
    return result;
}

DEVICE float weight(const Span& span, int tap) {
    float distance = fabsf((float)tap - span.centre) * span.inverse;
    return distance < 1.0f ? 1.0f - distance : 0.0f;
}

DEVICE float total(const Span& span) {
    float sum = 0;
    for (int tap = 0; tap < span.count; ++tap) sum += weight(span, tap);
    return sum;
}
