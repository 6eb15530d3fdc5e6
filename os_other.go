//go:build !unix

package main

import (
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/rs/zerolog"
)

// signalAct is what a signal does to a server: see os_unix.go.
type signalAct struct {
	name               string
	stop, insist, dump bool
}

func actOf(s os.Signal) signalAct { return signalAct{name: s.String(), stop: true, insist: true} }

func notifySignals(c chan<- os.Signal) { signal.Notify(c, syscall.SIGTERM, os.Interrupt) }

func handedOver() (map[string]*net.TCPListener, error) { return nil, nil }

func notifySystemd(_ <-chan struct{}, done chan<- struct{}, _ zerolog.Logger) { close(done) }

func descriptorLimit() uint64 { return 0 }
