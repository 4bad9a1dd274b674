// SPDX-License-Identifier: Apache-2.0
//
// The CPU time of the calling thread in ns, for node_bucket.js: Node itself tells only that of all threads together. A Node-API
// module is one function; of the interface, which does not change, there is no more here than that needs.
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef struct env *napi_env;
typedef struct value *napi_value;
typedef struct info *napi_callback_info;
typedef napi_value (*napi_callback)(napi_env, napi_callback_info);

int napi_create_double(napi_env env, double number, napi_value *result);
int napi_create_function(napi_env env, const char *name, size_t length, napi_callback call, void *data, napi_value *result);

static napi_value thread_cpu(napi_env env, napi_callback_info info)
{
	struct timespec now;
	napi_value result = NULL;

	(void)info;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	napi_create_double(env, now.tv_sec * 1e9 + now.tv_nsec, &result);
	return result;
}

napi_value napi_register_module_v1(napi_env env, napi_value exports)
{
	napi_value result = exports;

	napi_create_function(env, "threadCpu", SIZE_MAX, thread_cpu, NULL, &result);
	return result;
}
