# TensorRT: TensorRT_INCLUDE, TensorRT_LIBRARY, and CUDA's headers, which its own need. Looked for in TensorRT_ROOT and
# CUDAToolkit_ROOT (CMake or environment), then where the system has libraries and CUDA.
find_path(TensorRT_INCLUDE NvInferRuntime.h HINTS ${TensorRT_ROOT} $ENV{TensorRT_ROOT} PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY nvinfer HINTS ${TensorRT_ROOT} $ENV{TensorRT_ROOT} PATH_SUFFIXES lib)
find_path(TensorRT_CUDA_INCLUDE cuda_runtime_api.h
  HINTS ${CUDAToolkit_ROOT} $ENV{CUDAToolkit_ROOT} ${TensorRT_INCLUDE} /usr/local/cuda PATH_SUFFIXES include)
foreach(found TensorRT_INCLUDE TensorRT_LIBRARY TensorRT_CUDA_INCLUDE)
  if(NOT ${found})
    message(FATAL_ERROR "${found} is not found: set TensorRT_ROOT to the folder of TensorRT 10.16 or newer, and CUDAToolkit_ROOT to that of CUDA")
  endif()
endforeach()
get_filename_component(TensorRT_FOLDER ${TensorRT_LIBRARY} DIRECTORY)
