# Writes the text file INPUT into the C++ source OUTPUT: cmake -DINPUT=... -DOUTPUT=... -P embed.cmake
file(READ ${INPUT} text)
# One raw string literal a line, since compilers may limit the length of a single literal.
string(REPLACE "\n" "\n)json\"\nR\"json(" pieces "${text}")
get_filename_component(name ${INPUT} NAME)
file(WRITE ${OUTPUT} "// Written by embed.cmake from ${name}.
namespace tp {
extern const char* const kModelsJson;
const char* const kModelsJson =
R\"json(${pieces})json\";
}  // namespace tp
")
