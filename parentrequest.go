// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"net/http"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// refuseEcho refuses a request that the parent may answer itself by echoing the request it
// received: that would reveal the fields that are meant for the parent alone to the
// client (RFC 9110 §9.3.8). It must be called before readdress adds them.
func refuseEcho(p *egress.Parent, out *origin.Request) *refusal {
	if len(p.Header) == 0 {
		return nil
	}
	switch method := strings.ToUpper(out.Method); {
	case method == http.MethodTrace, method == "TRACK":
		return causeEchoMethod.refusal(nil, method)
	case method == http.MethodOptions && len(out.Header["Max-Forwards"]) > 0:
		return causeEchoMaxForwards.refusal(nil)
	case strings.EqualFold(out.Authority, p.Address):
		return causeEchoParent.refusal(nil, out.Host)
	}
	return nil
}

// readdress readdresses a request for an http origin to the parent, with its target in
// absolute form (RFC 9112 §3.2.2). requested is the authority from the client's request,
// which the rules have checked. It goes into the target even if header_up has changed Host.
// The header is cloned, so that the parent's fields, which may be secret, do not end up
// in the client's request.
func readdress(p *egress.Parent, out *origin.Request, requested string) {
	if out.Target == "*" {
		out.Target = ""
	}
	out.Target, out.Host = "http://"+requested+out.Target, requested
	out.Header = maps.Clone(out.Header)
	if len(p.Header) > 0 { // make sure that no proxy answers, as it could echo p.Header
		delete(out.Header, "Max-Forwards")
	}
	maps.Copy(out.Header, p.Header)
}
