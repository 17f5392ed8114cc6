# OpenVINO: the target openvino::runtime. The package of a Python carries headers, libraries and files for CMake:
# of TILEWRIGHT_PYTHON, or of .venv in a clone. OpenVINO_DIR names another one.
if(NOT OpenVINO_DIR)
  include(python_package)
  python_package(openvino package)
  if(package)
    set(OpenVINO_DIR ${package}/cmake CACHE PATH "OpenVINO's files for CMake" FORCE)
  endif()
endif()
find_package(OpenVINO REQUIRED COMPONENTS Runtime)
get_target_property(OpenVINO_LIBRARY openvino::runtime LOCATION)
get_filename_component(OpenVINO_FOLDER ${OpenVINO_LIBRARY} DIRECTORY)
