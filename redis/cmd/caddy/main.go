// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command caddy is Caddy with its standard modules, async_proxy and its limiter
// on Redis, so that `go build ./cmd/caddy` is all that a build needs.
package main

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/asyncproxy/caddy-async-proxy/internal/version"
	_ "github.com/asyncproxy/caddy-async-proxy/redis"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() {
	caddy.CustomVersion = "async_proxy " + version.Read().String() + " in Caddy" // whose version follows
	caddycmd.Main()
}
