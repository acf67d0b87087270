// All kernels as one translation unit: what becomes the fatbin.
#include "gather.cu"
#include "normalize.cu"
#include "screen.cu"
#include "histogram.cu"
#include "topk.cu"
