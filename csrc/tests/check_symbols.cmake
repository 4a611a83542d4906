# The objects of one instruction set may share no inline function with other code: the linker keeps
# one copy, and might keep the one an older processor cannot run.
# DW.ref.* are the compiler's pointers to the runtime's unwinder: data, the same for every processor.
# Usage: cmake -DNM=nm -DISA=avx512 "-DOBJECTS=a.o|b.o" -P check_symbols.cmake
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} cannot read ${object}")
  endif()
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
  foreach(symbol IN LISTS shared)
    if(NOT symbol MATCHES "fastmaml::${ISA}::|V DW\\.ref\\.")
      message(SEND_ERROR "${object} shares a symbol with other instruction sets: ${symbol}")
    endif()
  endforeach()
endforeach()
