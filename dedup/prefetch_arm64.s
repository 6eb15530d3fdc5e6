#include "textflag.h"

// func prefetch(p unsafe.Pointer)
TEXT ·prefetch(SB), NOSPLIT, $0-8
	MOVD p+0(FP), R0
	PRFM (R0), PLDL1KEEP
	RET

// func prefetchBoth(p unsafe.Pointer)
TEXT ·prefetchBoth(SB), NOSPLIT, $0-8
	MOVD p+0(FP), R0
	ADD  $64, R0, R1
	PRFM (R0), PLDL1KEEP
	PRFM (R1), PLDL1KEEP
	RET
