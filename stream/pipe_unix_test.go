//go:build unix

package stream

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestNamedPipeWithoutAReaderTakesNothing: its records wait until something reads.
func TestNamedPipeWithoutAReaderTakesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "counts")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, all := newFileSink(path, nil, 0, noStep), entries(t, 0, 3)
	if n, err := f.deliver(context.Background(), all); n != 0 || err == nil || !strings.Contains(err.Error(), "nothing reads") {
		t.Fatalf("without a reader: %d records delivered, %v", n, err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	deliver(t, f, all)
	var want []byte
	for _, e := range all {
		want = append(append(want, e.value...), '\n')
	}
	got := make([]byte, 2*len(want))
	n, err := reader.Read(got)
	if err != nil || !bytes.Equal(got[:n], want) {
		t.Errorf("read %q, %v; want %q", got[:n], err, want)
	}
}
