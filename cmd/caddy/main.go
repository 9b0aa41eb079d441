// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command caddy is Caddy with its standard modules and async_proxy. Build it with
// `go build ./cmd/caddy`.
package main

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/asyncproxy/caddy-async-proxy"
	"github.com/asyncproxy/caddy-async-proxy/internal/version"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() {
	caddy.CustomVersion = "async_proxy " + version.Read().String() + " in Caddy" // whose version follows
	caddycmd.Main()
}
