//go:build unix

package main

import (
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestSignalTableIsDocumented: the table of docs/operations.md lists for each signal what actOf
// returns for it.
func TestSignalTableIsDocumented(t *testing.T) {
	text, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	effects := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`SIG[^|]*) \\| ([^|]*) \\|").FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			effects[name[1]] = row[2]
		}
	}
	for _, name := range signalsLeft {
		if effect, ok := effects[name]; name != "SIGINFO" && (!ok || strings.Contains(effect, "stops")) { // which is BSD's
			t.Errorf("%s: documented as %q", name, effect)
		}
	}
	stop, ignored := testSignals()
	for _, s := range append(stop, ignored...) {
		name, act := signalName(s), actOf(s)
		effect, ok := effects[name]
		if !ok && s >= realTimeMin {
			continue // "the other real-time signals"
		}
		stops := strings.Contains(effect, "stops in order") && s != syscall.SIGHUP
		if !ok || stops != slices.Contains(stop, s) || act.insist != strings.Contains(effect, "a second one") ||
			act.dump != strings.Contains(effect, "goroutine") || act.silent == strings.Contains(effect, "with a line in the log") && !stops {
			t.Errorf("%s: %+v is documented as %q", name, act, effect)
		}
	}
}

// testSignals returns the signals that, by the table, stop a server, and those that it ignores.
// On Linux 32 to 34 belong to the threads of the C library.
func testSignals() (stop, ignored []syscall.Signal) {
	last := syscall.Signal(31)
	if runtime.GOOS == "linux" {
		last = lastSignal
	}
	for n := syscall.Signal(1); n <= last; n++ {
		switch {
		case slices.Contains(signalsLeft, signalName(n)), n >= 32 && n <= 34:
		case actOf(n).stop && n != syscall.SIGHUP: // depends on whether the tests run at a terminal
			stop = append(stop, n)
		default:
			ignored = append(ignored, n)
		}
	}
	return stop, ignored
}
