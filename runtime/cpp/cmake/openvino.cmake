# OpenVINO: the target openvino::runtime. The package of a Python carries headers, libraries and files for CMake:
# of TILEWRIGHT_PYTHON, or of .venv in a clone. OpenVINO_DIR names another one.
if(NOT OpenVINO_DIR)
  set(TILEWRIGHT_PYTHON ${CMAKE_CURRENT_LIST_DIR}/../../../.venv/bin/python CACHE FILEPATH "a Python with the package onnxruntime")
  execute_process(
    COMMAND ${TILEWRIGHT_PYTHON} -c "import importlib.util as u; print(u.find_spec('openvino').submodule_search_locations[0])"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(OpenVINO_DIR ${package}/cmake CACHE PATH "OpenVINO's files for CMake" FORCE)
  endif()
endif()
find_package(OpenVINO REQUIRED COMPONENTS Runtime)
get_target_property(OpenVINO_LIBRARY openvino::runtime LOCATION)
get_filename_component(OpenVINO_FOLDER ${OpenVINO_LIBRARY} DIRECTORY)
