//go:build linux

package main

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/redis/rueidis"
	"github.com/valyala/fasthttp"

	"verve/bench"
)

// Run serves until the process is ended.
func (s *serve) Run() error {
	ln, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return err
	}
	switch s.Design {
	case "nethttp":
		return serveNetHTTP(ln)
	case "plain":
		return servePlain(ln, s.Redis)
	case "seed":
		return serveSeed(ln)
	}
	// What fasthttp and the kernel take.
	return serveFast(ln, func(*fasthttp.RequestCtx) int { return http.StatusOK })
}

// bodyOf is the body that Verve has with a status.
func bodyOf(status int) string {
	if status == http.StatusOK {
		return "ok"
	}
	return "failed"
}

// serveFast serves with the settings that Verve's fasthttp has. judge returns the status of
// an answer.
func serveFast(ln net.Listener, judge func(*fasthttp.RequestCtx) int) error {
	server := fasthttp.Server{
		Handler: func(ctx *fasthttp.RequestCtx) {
			status := judge(ctx)
			ctx.Response.Header.SetContentType("text/plain")
			ctx.SetStatusCode(status)
			ctx.SetBodyString(bodyOf(status))
		},
		Concurrency:                  1 << 16,
		ReadBufferSize:               8 << 10,
		MaxRequestBodySize:           64 << 10,
		NoDefaultServerHeader:        true,
		SecureErrorLogMessage:        true,
		DisablePreParseMultipartForm: true,
		CloseOnShutdown:              true,
	}
	return server.Serve(ln)
}

// servePlain keeps a key per id in a Redis that instances share, as it is usually done: SET
// NX EX, by a library that sends the requests of all connections on one.
func servePlain(ln net.Listener, redis string) error {
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{redis}, DisableCache: true})
	if err != nil {
		return err
	}
	return serveFast(ln, func(ctx *fasthttp.RequestCtx) int {
		minute := time.Now().Unix() / 60
		key := strconv.FormatInt(minute, 10) + ":" + string(ctx.QueryArgs().Peek("id"))
		err := client.Do(context.Background(), client.B().Set().Key(key).Value("1").Nx().ExSeconds(120).Build()).Error()
		switch {
		case err == nil:
			return http.StatusOK
		case rueidis.IsRedisNil(err):
			return http.StatusConflict
		}
		return http.StatusServiceUnavailable
	})
}

// seed is the seed design with its ticker.
type seed struct{ *bench.Seed }

func newSeed() seed {
	s := seed{bench.NewSeed()}
	go func() {
		for range time.Tick(time.Minute) {
			log.Printf("unique: %d", s.RPM())
			s.Turn()
		}
	}()
	return s
}

// judge returns the status of the answer to a request for an id.
func (s seed) judge(id []byte) int {
	switch {
	case len(id) == 0:
		return http.StatusBadRequest
	case !s.Add(id, 0):
		return http.StatusConflict
	}
	return http.StatusOK
}

// serveSeed is the seed design on fasthttp.
func serveSeed(ln net.Listener) error {
	seed := newSeed()
	return serveFast(ln, func(ctx *fasthttp.RequestCtx) int {
		if string(ctx.Path()) != "/api/verve/accept" {
			return http.StatusNotFound
		}
		return seed.judge(ctx.QueryArgs().Peek("id"))
	})
}

// serveNetHTTP is the seed design on net/http.
func serveNetHTTP(ln net.Listener) error {
	seed := newSeed()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/verve/accept", func(w http.ResponseWriter, r *http.Request) {
		status := seed.judge([]byte(r.URL.Query().Get("id")))
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, bodyOf(status)) // a failed write is the client's loss
	})
	return http.Serve(ln, mux)
}
