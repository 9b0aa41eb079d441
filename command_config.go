// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/logging"
	"go.uber.org/zap"
)

// clearProtocols are the protocols of servers without TLS. Caddy warns about others there.
var clearProtocols = []string{"h1", "h2c"}

// commandServers returns the servers that the flags describe: the proxy, and the status page if
// there is one.
func commandServers(flags caddycmd.Flags, h *Handler) (map[string]*caddyhttp.Server, error) {
	listen := flags.String("listen")
	if err := checkEndpoint("--listen", listen); err != nil {
		return nil, err
	}
	servers := map[string]*caddyhttp.Server{"proxy": {
		Listen:              []string{listen},
		Protocols:           clearProtocols,
		ListenerWrappersRaw: []json.RawMessage{caddyconfig.JSONModuleObject(ListenerWrapper{}, "wrapper", "async_proxy", nil)},
		AutoHTTPS:           &caddyhttp.AutoHTTPSConfig{Disabled: true},
		Routes:              caddyhttp.RouteList{{HandlersRaw: handlersRaw(h, "async_proxy")}},
	}}
	if flags.String("access-log") != "" {
		servers["proxy"].Logs = new(caddyhttp.ServerLogConfig)
	}
	address := flags.String("status")
	if address == "" {
		if flags.Bool("actions") {
			return nil, errors.New("--actions: expected --status <addr> with it")
		}
		return servers, nil
	}
	if err := checkEndpoint("--status", address); err != nil {
		return nil, err
	}
	servers["status"] = statusServer(address, &Status{Actions: flags.Bool("actions")})
	return servers, nil
}

// statusServer returns a server with a status page. It answers only to the host in its address, and
// on the loopback interface to the usual names of that, so that no other name leads to the page's
// actions.
func statusServer(address string, page *Status) *caddyhttp.Server {
	route := caddyhttp.Route{HandlersRaw: handlersRaw(page, "async_proxy_status"), Terminal: true}
	addr, _ := caddy.ParseNetworkAddress(address)          // valid: it has been checked
	isHost := !addr.IsUnixNetwork() && !addr.IsFdNetwork() // and not a path or a number
	if hosts := hostsOf(addr.Host); isHost && len(hosts) > 0 {
		route.MatcherSetsRaw = caddyhttp.RawMatcherSets{{"host": caddyconfig.JSON(hosts, nil)}}
	}
	refusal := caddyhttp.StaticResponse{StatusCode: "421", Body: fmt.Sprintf("The status page is at http://%s/.\n", address)}
	return &caddyhttp.Server{
		Listen:    []string{address},
		Protocols: clearProtocols,
		AutoHTTPS: &caddyhttp.AutoHTTPSConfig{Disabled: true},
		Routes:    caddyhttp.RouteList{route, {HandlersRaw: handlersRaw(refusal, "static_response")}},
	}
}

// hostsOf returns the hosts by which a browser may name a server that listens on host; none if it
// listens everywhere.
func hostsOf(host string) []string {
	ip, err := netip.ParseAddr(host)
	switch {
	case host == "", err == nil && ip.IsUnspecified():
		return nil
	case host != "localhost" && (err != nil || !ip.IsLoopback()):
		return []string{host}
	}
	hosts := []string{host}
	for _, usual := range []string{"localhost", "127.0.0.1", "::1"} {
		if usual != host {
			hosts = append(hosts, usual)
		}
	}
	return hosts
}

// handlersRaw returns a route's only handler.
func handlersRaw(handler any, name string) []json.RawMessage {
	return []json.RawMessage{caddyconfig.JSONModuleObject(handler, "handler", name, nil)}
}

// commandLogging returns the logs that the flags describe, or nil for Caddy's default.
func commandLogging(flags caddycmd.Flags) *caddy.Logging {
	logs := make(map[string]*caddy.CustomLog)
	if flags.Bool("debug") {
		logs["default"] = &caddy.CustomLog{BaseLog: caddy.BaseLog{Level: zap.DebugLevel.CapitalString()}}
	}
	if file := flags.String("access-log"); file != "" && file != accessToStderr {
		const name = "http.log.access"
		if logs["default"] == nil {
			logs["default"] = new(caddy.CustomLog)
		}
		logs["default"].Exclude = []string{name}
		writer := caddyconfig.JSONModuleObject(logging.FileWriter{Filename: file}, "output", "file", nil)
		logs["access"] = &caddy.CustomLog{BaseLog: caddy.BaseLog{WriterRaw: writer}, Include: []string{name}}
	}
	if len(logs) == 0 {
		return nil
	}
	return &caddy.Logging{Logs: logs}
}
