# PyTorch for packages of AOTInductor: Torch_FOLDER, Torch_LIBRARIES and Torch_VERSION. The package of a Python carries headers
# and libraries: of TILEWRIGHT_PYTHON, or of .venv in a clone. Torch_DIR names another one, as for find_package(Torch).
#
# PyTorch's own files for CMake are not read: those of a package for GPUs ask for CUDA's compiler, and an engine here needs none.
if(NOT Torch_DIR)
  set(TILEWRIGHT_PYTHON ${CMAKE_CURRENT_LIST_DIR}/../../../.venv/bin/python CACHE FILEPATH "a Python with the package onnxruntime")
  execute_process(
    COMMAND ${TILEWRIGHT_PYTHON} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(Torch_DIR ${package}/share/cmake/Torch CACHE PATH "PyTorch's files for CMake" FORCE)
  endif()
endif()
get_filename_component(Torch_FOLDER "${Torch_DIR}/../../.." ABSOLUTE)
set(Torch_VERSION_FILE ${Torch_FOLDER}/include/torch/headeronly/version.h)
set(Torch_LIBRARIES ${Torch_FOLDER}/lib/libtorch_cpu.so ${Torch_FOLDER}/lib/libc10.so)
foreach(file ${Torch_VERSION_FILE} ${Torch_LIBRARIES})
  if(NOT EXISTS ${file})
    message(FATAL_ERROR "no PyTorch with ${file}; install torch into the Python ${TILEWRIGHT_PYTHON}, or set Torch_DIR")
  endif()
endforeach()
set(Torch_VERSION)
foreach(part MAJOR MINOR PATCH)
  file(STRINGS ${Torch_VERSION_FILE} line REGEX "define TORCH_VERSION_${part} ")
  string(REGEX MATCH "[0-9]+" number "${line}")
  list(APPEND Torch_VERSION ${number})
endforeach()
list(JOIN Torch_VERSION . Torch_VERSION)
