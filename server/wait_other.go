//go:build !linux

package server

// edgeTriggered is false: it is not known whether this system wakes a reader that waits without
// having read before.
const edgeTriggered = false

// waitAndRead is not called if edgeTriggered is false.
func (*fastPath) waitAndRead(*conn, []byte) (have int, done bool, err error) {
	panic("server: this system may not wake a reader that has not looked")
}
