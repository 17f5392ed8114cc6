# Sets `result` to the folder of a package of Python, or to nothing: of TILEWRIGHT_PYTHON, or of .venv in a clone.
set(TILEWRIGHT_PYTHON ${CMAKE_CURRENT_LIST_DIR}/../../../.venv/bin/python CACHE FILEPATH "a Python with the package onnxruntime")
function(python_package name result)
  execute_process(
    COMMAND ${TILEWRIGHT_PYTHON} -c "import importlib.util as u; print(u.find_spec('${name}').submodule_search_locations[0])"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    set(folder)
  endif()
  set(${result} ${folder} PARENT_SCOPE)
endfunction()
