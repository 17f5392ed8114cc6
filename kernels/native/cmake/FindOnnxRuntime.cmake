# Headers of ONNX Runtime: OnnxRuntime_INCLUDE_DIR, and the target OnnxRuntime::headers.
#
# Looked for in ONNXRUNTIME_ROOT (CMake or environment), then where pkg-config says, then in build/onnxruntime, where
# headers.sh puts them. A library of ops links no ONNX Runtime: the one that loads it hands its functions over.
set(roots ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
set(suffixes include include/onnxruntime include/onnxruntime/core/session)
find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h PATHS ${roots} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
if(NOT OnnxRuntime_INCLUDE_DIR AND NOT roots)
  find_package(PkgConfig QUIET)
  if(PkgConfig_FOUND)
    pkg_check_modules(OnnxRuntime_PC QUIET libonnxruntime)
  endif()
  find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h
    HINTS ${OnnxRuntime_PC_INCLUDE_DIRS}
    PATHS ${CMAKE_CURRENT_LIST_DIR}/../../../build/onnxruntime
    PATH_SUFFIXES onnxruntime ${suffixes})
endif()

if(OnnxRuntime_INCLUDE_DIR)
  file(STRINGS ${OnnxRuntime_INCLUDE_DIR}/onnxruntime_c_api.h line REGEX "^#define ORT_API_VERSION")
  string(REGEX MATCH "[0-9]+" OnnxRuntime_VERSION "${line}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS OnnxRuntime_INCLUDE_DIR
  VERSION_VAR OnnxRuntime_VERSION
  REASON_FAILURE_MESSAGE "run kernels/native/headers.sh build/onnxruntime, or set ONNXRUNTIME_ROOT")

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::headers)
  add_library(OnnxRuntime::headers INTERFACE IMPORTED)
  target_include_directories(OnnxRuntime::headers SYSTEM INTERFACE ${OnnxRuntime_INCLUDE_DIR})
endif()
