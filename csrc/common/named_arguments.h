// Arguments that operators take by name, each list written once, so that schemas and functions cannot drift apart. A list is a
// macro such as
//
//   #define SIZES(INT, BOOL, FLOAT) INT(height), BOOL(padded), FLOAT(scale)
//
// RES2NET_SCHEMA(SIZES) is "int height, bool padded, float scale", RES2NET_PARAMETERS(SIZES) the same as parameters of a
// function, and RES2NET_VALUES(SIZES) passes them on: height, padded, scale. Python passes keywords, which the schema checks.
#pragma once
#include <cstdint>

#define RES2NET_INT_PARAMETER(name) int64_t name
#define RES2NET_BOOL_PARAMETER(name) bool name
#define RES2NET_FLOAT_PARAMETER(name) double name
#define RES2NET_VALUE(name) name
#define RES2NET_INT_SCHEMA(name) int name
#define RES2NET_BOOL_SCHEMA(name) bool name
#define RES2NET_FLOAT_SCHEMA(name) float name
#define RES2NET_TEXT(...) #__VA_ARGS__
#define RES2NET_EXPANDED_TEXT(...) RES2NET_TEXT(__VA_ARGS__)

#define RES2NET_PARAMETERS(LIST) LIST(RES2NET_INT_PARAMETER, RES2NET_BOOL_PARAMETER, RES2NET_FLOAT_PARAMETER)
#define RES2NET_VALUES(LIST) LIST(RES2NET_VALUE, RES2NET_VALUE, RES2NET_VALUE)
#define RES2NET_SCHEMA(LIST) RES2NET_EXPANDED_TEXT(LIST(RES2NET_INT_SCHEMA, RES2NET_BOOL_SCHEMA, RES2NET_FLOAT_SCHEMA))
