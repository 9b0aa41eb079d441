// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// setup is what a client needs to know to use the proxy. It is for clients that have sent a request
// for the server itself. Of the configuration, it reveals only where the PAC script is.
type setup struct {
	Text       string // that this is a proxy
	URL        string // of the proxy
	Address    string // its host and port
	Host, Port string
	PAC        string // the URL of the PAC script; "": there is none
	OverTLS    bool
	Systems    []setupPlace
	Style      template.CSS
}

// setupPlace says where a system or a browser has its settings for proxies.
type setupPlace struct {
	Name, Where string
	Open        bool // it is the client's
}

//go:embed setuppage.html
var setupHTML string

var setupTemplate = template.Must(template.New("setup").Parse(setupHTML))

const setupStyle = `:root{color-scheme:light dark}body{margin:0;font:16px/1.5 system-ui,sans-serif}main{max-width:42rem;margin:0 auto;padding:1.5rem}` +
	`h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}pre{padding:.6rem .8rem;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8886;border-radius:6px;background:#8881;user-select:all}` +
	`p{margin:.6rem 0}details{margin:.4rem 0}details p{margin:.2rem 0 .2rem 1.1rem}summary{cursor:pointer}`

// setupPolicy is the Content-Security-Policy of the page: nothing but its own style.
var setupPolicy = func() string {
	sum := sha256.Sum256([]byte(setupStyle))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// setupOf returns what the client of r needs to know. text says that this is a proxy.
func (p *proxy) setupOf(r *http.Request, text string) setup {
	s := setup{Text: text, OverTLS: r.TLS != nil, Style: setupStyle}
	s.Host, s.Port = reachedAt(r)
	s.Address = net.JoinHostPort(s.Host, s.Port)
	scheme := "http://"
	if s.OverTLS {
		scheme = "https://"
	}
	s.URL = scheme + s.Address
	if p.config.ServePAC != "" {
		s.PAC = s.URL + p.config.ServePAC
	}
	s.Systems = setupPlaces(r.UserAgent())
	return s
}

// setupPlaces returns the systems that people use, with the one that a User-Agent field names open.
func setupPlaces(agent string) []setupPlace {
	places := []struct{ token, name, where string }{
		{"Android", "Android", "Settings, Network & internet, Internet, your network, Edit, Proxy"},
		{"iPhone", "iPhone and iPad", "Settings, Wi-Fi, your network, Configure Proxy"},
		{"Windows", "Windows", "Settings, Network & internet, Proxy"},
		{"Mac OS X", "macOS", "System Settings, Network, your network, Details, Proxies"},
		{"Linux", "Linux with GNOME", "Settings, Network, Proxy"},
		{"Firefox", "Firefox, on any system", "Settings, General, Network Settings"},
	}
	var list []setupPlace
	known := false
	for _, each := range places {
		// The User-Agent of an iPhone names Mac OS X as well, and that of Android names Linux.
		isSystem := each.token != "Firefox"
		open := strings.Contains(agent, each.token) && (!isSystem || !known)
		known = known || open && isSystem
		list = append(list, setupPlace{each.name, each.where, open})
	}
	return list
}

// plain returns the text for clients that show text.
func (s setup) plain() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\n\nOne request:   curl -x %s https://example.com/\nMost programs: export http_proxy=%[2]s https_proxy=%[2]s\n", s.Text, s.URL)
	switch {
	case s.PAC != "":
		fmt.Fprintf(&b, "Browsers:      automatic proxy configuration from %s\n", s.PAC)
	case !s.OverTLS:
		fmt.Fprintf(&b, "Browsers:      host %s, port %s, for HTTP and for HTTPS\n", s.Host, s.Port)
	}
	return b.Bytes()
}

// describeSetup returns the body of the response to a request for the server itself that no handler
// has answered: a page for browsers, otherwise text, either of which explains how to use the proxy. It
// sets the fields that belong to it. The response depends on the Host field, so it must not be stored.
func (p *proxy) describeSetup(header http.Header, r *http.Request, f *refusal) []byte {
	s := p.setupOf(r, f.Error())
	if !prefersHTML(r.Header["Accept"]) {
		return s.plain()
	}
	var b bytes.Buffer
	_ = setupTemplate.Execute(&b, s) // never fails: the tests execute every branch
	header["Content-Type"] = []string{"text/html; charset=utf-8"}
	header["Content-Security-Policy"] = []string{setupPolicy}
	header["Referrer-Policy"] = []string{"no-referrer"}
	return b.Bytes()
}

// prefersHTML reports whether an Accept field asks for HTML by name, as those of browsers do, and
// does not prefer plain text to it.
func prefersHTML(accept []string) bool {
	html, plain := 0.0, 0.0
	for _, value := range accept {
		for element := range strings.SplitSeq(value, ",") {
			switch name, q := acceptElement(element); name {
			case "text/html":
				html = max(html, q)
			case "text/plain":
				plain = max(plain, q)
			}
		}
	}
	return html > 0 && html >= plain
}

// reachedAt returns the host and the port by which a client has reached the server: those of the
// Host field, or with TLS the server name, because the Host field may be the destination's. A client
// can send anything there, and the result may be pasted into a shell, so an example replaces everything but
// a plain name. The local address would tell strangers what is behind a load balancer.
func reachedAt(r *http.Request) (host, port string) {
	localPort := "8080" // on a Unix socket
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if at, err := netip.ParseAddrPort(local.String()); err == nil {
			localPort = fmt.Sprint(at.Port())
		}
	}
	host, port, err := net.SplitHostPort(r.Host)
	if err != nil {
		host, port = strings.Trim(r.Host, "[]"), "80"
		if r.TLS != nil {
			port = "443"
		}
	}
	if r.TLS != nil && r.TLS.ServerName != "" && !strings.EqualFold(host, r.TLS.ServerName) {
		host, port = r.TLS.ServerName, localPort
	}
	n, ok := parseInt(port, 1, 65535)
	if !ok || !isPlainName(host) {
		return "proxy.example.com", localPort
	}
	return host, fmt.Sprint(n)
}

// isPlainName reports whether a host consists of nothing that means anything to a shell or to HTML.
func isPlainName(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Zone() == ""
	}
	isPlain := func(c byte) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
	}
	return host != "" && len(host) <= 253 && host[0] != '-' && !slices.ContainsFunc([]byte(host), func(c byte) bool { return !isPlain(c) })
}
