/*
 * A stand-in for the driver's libnvidia-ml.so.1, for the tests of this package:
 * the functions of NVML that muster calls, and no others. FAKENVML in the
 * environment chooses how it behaves:
 *
 *   ok        two GPUs; the second is split into MIG slices
 *   none      no GPU
 *   mismatch, unloaded, denied   nvmlInit refuses
 *   lost      the second GPU has fallen off the bus
 *   segv      a call through a bad pointer
 *   raise     SIGSEGV from raise(), as from a library's own check
 *   abort     abort(), as glibc does on a corrupt heap
 *   exit      exit(3) with a message
 *   hang      nvmlInit never returns
 *   hangdev   the GPU's name never comes
 *   garbage   something else than an answer on standard output
 *   flood     2 MiB of it
 *   absurd    four billion GPUs
 *   unclean   control bytes and invalid UTF-8 in strings
 *
 * -DWITHOUT_COUNT leaves out a function that muster cannot do without,
 * -DOLD those that old drivers do not have.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int ret_t;
typedef struct gpu *dev_t_;
struct gpu { int index; int slice; };

enum {
	SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
	DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, LIB_RM_VERSION_MISMATCH = 18
};

static struct gpu gpus[2] = { { 0, -1 }, { 1, -1 } };

static int mode(const char *name)
{
	const char *m = getenv("FAKENVML");
	return m != NULL && strcmp(m, name) == 0;
}

static void hang(void)
{
	for (;;)
		pause();
}

static int lost(dev_t_ d) { return mode("lost") && d->index == 1; }

ret_t nvmlInit_v2(void)
{
	if (mode("mismatch"))
		return LIB_RM_VERSION_MISMATCH;
	if (mode("unloaded"))
		return DRIVER_NOT_LOADED;
	if (mode("denied"))
		return NO_PERMISSION;
	if (mode("segv"))
		*(volatile int *)8 = 1;
	if (mode("raise"))
		raise(SIGSEGV);
	if (mode("abort"))
		abort();
	if (mode("exit")) {
		fprintf(stderr, "fakenvml: cannot go on\n");
		exit(3);
	}
	if (mode("hang"))
		hang();
	if (mode("garbage")) {
		printf("<html>not an inventory</html>\n");
		fflush(stdout);
		_exit(0);
	}
	if (mode("flood")) {
		int i;
		for (i = 0; i < 2048; i++)
			printf("%1024d", i);
		fflush(stdout);
	}
	return SUCCESS;
}

const char *nvmlErrorString(ret_t r)
{
	switch (r) {
	case SUCCESS: return "Success";
	case NO_PERMISSION: return "Insufficient Permissions";
	case GPU_IS_LOST: return "GPU is lost";
	case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
	default: return "Unknown Error";
	}
}

ret_t nvmlSystemGetDriverVersion(char *version, unsigned length)
{
	snprintf(version, length, "550.54.15");
	return SUCCESS;
}

#ifndef WITHOUT_COUNT
ret_t nvmlDeviceGetCount_v2(unsigned *count)
{
	*count = mode("none") ? 0 : mode("absurd") ? 4000000000u : 2;
	return SUCCESS;
}
#endif

ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, dev_t_ *device)
{
	if (index > 1)
		return INVALID_ARGUMENT;
	*device = &gpus[index];
	return SUCCESS;
}

ret_t nvmlDeviceGetUUID(dev_t_ d, char *uuid, unsigned length)
{
	if (lost(d))
		return GPU_IS_LOST;
	if (d->slice >= 0)
		snprintf(uuid, length, "MIG-00000000-0000-0000-0000-00000000000%d", d->slice);
	else
		snprintf(uuid, length, "GPU-00000000-0000-0000-0000-00000000000%d", d->index);
	return SUCCESS;
}

ret_t nvmlDeviceGetName(dev_t_ d, char *name, unsigned length)
{
	if (mode("hangdev"))
		hang();
	if (mode("unclean"))
		snprintf(name, length, "NVIDIA\033[31m \xff\xfe" "Fake");
	else
		snprintf(name, length, d->slice >= 0 ? "NVIDIA Fake MIG 1g.12gb" : "NVIDIA Fake H100");
	return SUCCESS;
}

struct memory { unsigned long long total, free, used; };

ret_t nvmlDeviceGetMemoryInfo(dev_t_ d, struct memory *memory)
{
	memset(memory, 0, sizeof *memory);
	memory->total = (d->slice >= 0 ? 12ull : 80ull) << 30;
	return SUCCESS;
}

ret_t nvmlDeviceGetCudaComputeCapability(dev_t_ d, int *major, int *minor)
{
	(void)d;
	*major = 9;
	*minor = 0;
	return SUCCESS;
}

#ifndef OLD
static struct gpu parts[2] = { { 1, 0 }, { 1, 2 } };

ret_t nvmlDeviceGetArchitecture(dev_t_ d, unsigned *arch)
{
	(void)d;
	*arch = 9;
	return SUCCESS;
}

ret_t nvmlDeviceGetMigMode(dev_t_ d, unsigned *current, unsigned *pending)
{
	*current = *pending = d->index == 1 && d->slice < 0;
	return SUCCESS;
}

ret_t nvmlDeviceGetMaxMigDeviceCount(dev_t_ d, unsigned *count)
{
	(void)d;
	*count = 7;
	return SUCCESS;
}

ret_t nvmlDeviceGetMigDeviceHandleByIndex(dev_t_ d, unsigned index, dev_t_ *slice)
{
	(void)d;
	if (index != 0 && index != 2)
		return NOT_FOUND;
	*slice = &parts[index / 2];
	return SUCCESS;
}

ret_t nvmlDeviceGetRemappedRows(dev_t_ d, unsigned *corr, unsigned *unc, unsigned *pending, unsigned *failed)
{
	(void)d;
	*corr = *unc = *pending = *failed = 0;
	return SUCCESS;
}

ret_t nvmlDeviceGetTotalEccErrors(dev_t_ d, int kind, int counter, unsigned long long *errors)
{
	(void)d;
	/* 3 corrected ones; muster asks for uncorrected (1), volatile (0). */
	*errors = kind == 1 && counter == 0 ? 0 : 3;
	return SUCCESS;
}
#endif

ret_t nvmlDeviceGetTemperature(dev_t_ d, int sensor, unsigned *celsius)
{
	if (d->slice >= 0 || sensor != 0)
		return NOT_SUPPORTED;
	*celsius = 41;
	return SUCCESS;
}

ret_t nvmlDeviceGetPowerUsage(dev_t_ d, unsigned *milliwatts)
{
	if (d->slice >= 0)
		return NOT_SUPPORTED;
	*milliwatts = 71500;
	return SUCCESS;
}

struct utilization { unsigned gpu, memory; };

ret_t nvmlDeviceGetUtilizationRates(dev_t_ d, struct utilization *u)
{
	if (d->index == 1)
		return NOT_SUPPORTED; /* as on a GPU that is split */
	u->gpu = 7;
	u->memory = 3;
	return SUCCESS;
}
