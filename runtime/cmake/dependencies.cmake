# Where headers and libraries of others are. Each is looked for where its variable says, in the
# system, in the Python that CMake found, and among what tools/fetch_debian.py has fetched or can
# fetch now; what needs one that is missing is left out, and says so.
#
#     MLA_ONNXRUNTIME_INCLUDE   the operator library, the engine   libonnxruntime-dev
#     MLA_JSON_INCLUDE          the engine                         PyPI's nlohmann-json
#     MLA_PCRE2_INCLUDE, MLA_PCRE2_LIBRARY                         libpcre2-dev
#     MLA_UTF8PROC_INCLUDE, MLA_UTF8PROC_LIBRARY                   libutf8proc-dev
#
# The last two are of tokenizers in C++, and linked statically where they can be, so that
# libmla_deploy.so needs nothing that its system may lack.
option(MLA_FETCH_DEPENDENCIES
       "fetch headers and libraries with apt, without installing them, if they are not found" ON)

set(MLA_DEBIAN "${PROJECT_SOURCE_DIR}/../build/debian")
if(CMAKE_CROSSCOMPILING AND CMAKE_SYSTEM_PROCESSOR STREQUAL aarch64)
    set(debian_arch arm64)
    string(APPEND MLA_DEBIAN "-arm64")
endif()

# Sets <package>_ROOT to the folder of a fetched package, or MLA_FETCH_ERROR to why there is none.
function(mla_fetch_debian package)
    set(${package}_ROOT "${MLA_DEBIAN}/${package}/usr" PARENT_SCOPE)
    if(EXISTS "${MLA_DEBIAN}/${package}" OR NOT MLA_FETCH_DEPENDENCIES OR NOT Python_EXECUTABLE)
        return()
    endif()
    message(STATUS "fetching ${package}")
    set(tool "${PROJECT_SOURCE_DIR}/../tools/fetch_debian.py" --folder "${MLA_DEBIAN}")
    if(debian_arch)
        list(APPEND tool --arch ${debian_arch})
    endif()
    execute_process(COMMAND "${Python_EXECUTABLE}" ${tool} ${package}
        OUTPUT_QUIET ERROR_VARIABLE error ERROR_STRIP_TRAILING_WHITESPACE)
    set(MLA_FETCH_ERROR "${error}" PARENT_SCOPE)
endfunction()

# Unset where the file is gone that was found last time.
function(mla_forget_missing)
    foreach(variable IN LISTS ARGN)
        if(DEFINED ${variable} AND NOT EXISTS "${${variable}}")
            unset(${variable} CACHE)
        endif()
    endforeach()
endfunction()

mla_forget_missing(MLA_ONNXRUNTIME_INCLUDE MLA_JSON_INCLUDE MLA_PCRE2_INCLUDE MLA_PCRE2_LIBRARY
    MLA_UTF8PROC_INCLUDE MLA_UTF8PROC_LIBRARY)

# ---- ONNX Runtime's headers, which come from ONNXRUNTIME_ROOT alone if that is set -------------
set(header onnxruntime_c_api.h)
set(suffixes onnxruntime onnxruntime/core/session
             include include/onnxruntime include/onnxruntime/core/session)
if(NOT ONNXRUNTIME_ROOT)
    set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}")
endif()
if(ONNXRUNTIME_ROOT)
    unset(MLA_ONNXRUNTIME_INCLUDE CACHE)
    find_path(MLA_ONNXRUNTIME_INCLUDE ${header} PATHS "${ONNXRUNTIME_ROOT}"
              PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
    if(NOT MLA_ONNXRUNTIME_INCLUDE)
        message(FATAL_ERROR "ONNXRUNTIME_ROOT is ${ONNXRUNTIME_ROOT}, but there is no ${header} in "
                "it or in its include folders: correct it, or leave it out")
    endif()
else()
    find_path(MLA_ONNXRUNTIME_INCLUDE ${header} PATH_SUFFIXES ${suffixes})
    if(NOT MLA_ONNXRUNTIME_INCLUDE)
        mla_fetch_debian(libonnxruntime-dev)
        find_path(MLA_ONNXRUNTIME_INCLUDE ${header} PATHS "${libonnxruntime-dev_ROOT}"
                  PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
    endif()
endif()

# ---- nlohmann/json ------------------------------------------------------------------------------
if(Python_EXECUTABLE)  # asked, as an isolated build keeps its requirements in a folder of its own
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
        OUTPUT_VARIABLE json_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(MLA_JSON_INCLUDE nlohmann/json.hpp)
find_path(MLA_JSON_INCLUDE nlohmann/json.hpp PATHS "${json_package}/include"
          NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)

# ---- PCRE2 and utf8proc -------------------------------------------------------------------------
function(mla_find_library package prefix header library)
    find_library(${prefix}_LIBRARY NAMES lib${library}.a ${library})
    find_path(${prefix}_INCLUDE ${header})
    if(NOT ${prefix}_LIBRARY OR NOT ${prefix}_INCLUDE)
        mla_fetch_debian(${package})
        set(MLA_FETCH_ERROR "${MLA_FETCH_ERROR}" PARENT_SCOPE)
        set(root "${${package}_ROOT}")
        file(GLOB multiarch "${root}/lib/*-linux-gnu")
        unset(${prefix}_INCLUDE CACHE)
        unset(${prefix}_LIBRARY CACHE)
        find_path(${prefix}_INCLUDE ${header} PATHS "${root}/include"
                  NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
        find_library(${prefix}_LIBRARY NAMES lib${library}.a PATHS ${multiarch}
                     NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
    endif()
endfunction()

if(MLA_ENGINE AND NOT SKBUILD)
    mla_find_library(libpcre2-dev MLA_PCRE2 pcre2.h pcre2-8)
    mla_find_library(libutf8proc-dev MLA_UTF8PROC utf8proc.h utf8proc)
endif()
mark_as_advanced(MLA_ONNXRUNTIME_INCLUDE MLA_JSON_INCLUDE MLA_PCRE2_INCLUDE MLA_PCRE2_LIBRARY
    MLA_UTF8PROC_INCLUDE MLA_UTF8PROC_LIBRARY)
