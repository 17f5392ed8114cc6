/* The part of CUDA's header that TensorRT's needs, for tests. */
#pragma once
typedef struct CUstream_st *cudaStream_t;
