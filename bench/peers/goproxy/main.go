// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command goproxy is the smallest forward proxy with the library goproxy. The library has no
// access log. With -log, this program writes a line for each request by the library's hooks
// and the standard library's log.
package main

import (
	"flag"
	"io"
	"log"
	"net/http"
	"os"

	"github.com/elazarl/goproxy"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "address to listen on")
	access := flag.String("log", "", "access log")
	flag.Parse()
	proxy := goproxy.NewProxyHttpServer()
	// By default, the transport keeps two connections to an origin, and closes all others.
	proxy.Tr = &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true}
	log.SetOutput(io.Discard)
	if *access != "" {
		file, err := os.OpenFile(*access, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		addLog(proxy, log.New(file, "", log.LstdFlags))
	}
	if err := http.ListenAndServe(*listen, proxy); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
}

// addLog logs each response, and each CONNECT.
func addLog(proxy *goproxy.ProxyHttpServer, lines *log.Logger) {
	proxy.OnResponse().DoFunc(func(r *http.Response, ctx *goproxy.ProxyCtx) *http.Response {
		status, length := 0, int64(0)
		if r != nil {
			status, length = r.StatusCode, r.ContentLength
		}
		lines.Printf("%s %s %s %d %d", ctx.Req.RemoteAddr, ctx.Req.Method, ctx.Req.URL, status, length)
		return r
	})
	proxy.OnRequest().HandleConnectFunc(func(host string, ctx *goproxy.ProxyCtx) (*goproxy.ConnectAction, string) {
		lines.Printf("%s CONNECT %s", ctx.Req.RemoteAddr, host)
		return goproxy.OkConnect, host
	})
}
