# ONNX Runtime with its library: the target OnnxRuntime::library. The headers are found by kernels/native/cmake.
#
# Looked for in ONNXRUNTIME_ROOT (CMake or environment), then where pkg-config says, then in the package of a Python:
# TILEWRIGHT_PYTHON, or .venv of a clone. The library there has no name that a linker finds, so it gets one in the build folder.
find_package(OnnxRuntime 17 REQUIRED)
set(roots ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
find_library(OnnxRuntimeLibrary_FILE onnxruntime PATHS ${roots} PATH_SUFFIXES lib lib64 lib/x86_64-linux-gnu NO_DEFAULT_PATH)
if(NOT OnnxRuntimeLibrary_FILE)
  find_package(PkgConfig QUIET)
  if(PkgConfig_FOUND)
    pkg_check_modules(OnnxRuntime_PC QUIET libonnxruntime)
    if(OnnxRuntime_PC_FOUND)
      find_library(OnnxRuntimeLibrary_FILE onnxruntime HINTS ${OnnxRuntime_PC_LIBRARY_DIRS})
    endif()
  endif()
endif()
if(NOT OnnxRuntimeLibrary_FILE)
  set(TILEWRIGHT_PYTHON ${CMAKE_CURRENT_LIST_DIR}/../../../.venv/bin/python CACHE FILEPATH "a Python with the package onnxruntime")
  execute_process(
    COMMAND ${TILEWRIGHT_PYTHON} -c
      "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('onnxruntime').origin).parent.glob('capi/libonnxruntime.so.*')))"
    OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(folder ${CMAKE_BINARY_DIR}/onnxruntime)
    file(MAKE_DIRECTORY ${folder})
    file(CREATE_LINK ${wheel} ${folder}/libonnxruntime.so.1 SYMBOLIC)
    file(CREATE_LINK libonnxruntime.so.1 ${folder}/libonnxruntime.so SYMBOLIC)
    set(OnnxRuntimeLibrary_FILE ${folder}/libonnxruntime.so CACHE FILEPATH "ONNX Runtime's library" FORCE)
  endif()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntimeLibrary
  REQUIRED_VARS OnnxRuntimeLibrary_FILE
  REASON_FAILURE_MESSAGE "set ONNXRUNTIME_ROOT, or TILEWRIGHT_PYTHON to a Python with the package onnxruntime")
if(OnnxRuntimeLibrary_FOUND AND NOT TARGET OnnxRuntime::library)
  add_library(OnnxRuntime::library SHARED IMPORTED)
  set_target_properties(OnnxRuntime::library PROPERTIES IMPORTED_LOCATION ${OnnxRuntimeLibrary_FILE})
  target_link_libraries(OnnxRuntime::library INTERFACE OnnxRuntime::headers)
endif()
