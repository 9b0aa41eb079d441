// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

// userLine returns a line of a users_file.
func userLine(user, password string) string {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		panic(err)
	}
	return user + ":" + string(hash) + "\n"
}

// usersWorld is a proxy with a users_file.
type usersWorld struct {
	*world
	file string
}

func newUsersWorld(t *testing.T, text, options string) *usersWorld {
	w := &usersWorld{file: filepath.Join(t.TempDir(), "users")}
	w.write(t, text)
	w.world = newWorld(t, "users_file "+w.file+"\n"+options, nil)
	return w
}

// write replaces the file as editors do.
func (w *usersWorld) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(w.file+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(w.file+".new", w.file); err != nil {
		t.Fatal(err)
	}
}

// status returns the status of a request of a user.
func (w *usersWorld) status(user, password string) int {
	w.t.Helper()
	res, _ := policyRequest(w.t.(*testing.T), w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+login(user, password)+"\n")
	return res.StatusCode
}

func (w *usersWorld) expect(what string, want int, user, password string) {
	w.t.Helper()
	if got := w.status(user, password); got != want {
		w.t.Errorf("%s: %d, want %d", what, got, want)
	}
}

// TestUsersFileChanges checks that users come, go and change with their file, whatever was cached, and
// stay as they were when the file has a mistake.
func TestUsersFileChanges(t *testing.T) {
	w := newUsersWorld(t, "# the staff\n\n"+userLine("alice", "wonderland")+userLine("bob", "builder"), "failed_logins off")
	w.expect("a user", 200, "alice", "wonderland")
	w.expect("another user", 200, "bob", "builder")
	w.expect("a wrong password", 407, "bob", "wonderland")
	w.expect("no such user", 407, "carol", "carpenter")

	w.write(t, userLine("bob", "wonderland")+userLine("carol", "carpenter"))
	eventually(t, "the file to be read again", func() bool { return w.status("carol", "carpenter") == 200 })
	w.expect("a user who is gone", 407, "alice", "wonderland")
	w.expect("a new password", 200, "bob", "wonderland")
	w.expect("an old password", 407, "bob", "builder")
	if line := w.waitLog("users_file has been read again", 1)[0]; line["users"] != 2.0 {
		t.Errorf("logged %v", line)
	}

	w.write(t, userLine("alice", "wonderland")+"dave\n")
	eventually(t, "the mistake to be found", func() bool {
		w.expect("after a mistake", 200, "carol", "carpenter")
		return len(w.logLines("users_file cannot be read; the users stay as they were")) > 0
	})
	w.expect("a user of the file with a mistake", 407, "alice", "wonderland")
	line := w.waitLog("users_file cannot be read; the users stay as they were", 1)[0]
	if want := w.file + ":2: the line is not a user and a hash; expected <user>:<hash>, as htpasswd -B prints it"; line["error"] != want {
		t.Errorf("logged %q, want %q", line["error"], want)
	}
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	time.Sleep(usersFileInterval)
	w.expect("without the file", 200, "carol", "carpenter")
	w.write(t, userLine("erin", "explorer"))
	eventually(t, "the new file to be read", func() bool { return w.status("erin", "explorer") == 200 })
	w.expect("a user who is gone at last", 407, "carol", "carpenter")
}

// TestUsersFileBesideBasicAuth checks that both may have users, with hashes of their own kinds, and
// that policies see the users of the file.
func TestUsersFileBesideBasicAuth(t *testing.T) {
	salt, base64 := []byte("0123456789abcdef"), base64.RawStdEncoding
	argon := "$argon2id$v=19$m=64,t=1,p=1$" + base64.EncodeToString(salt) + "$" + base64.EncodeToString(argon2.IDKey([]byte("explorer"), salt, 1, 64, 1, 32))
	htpasswd, err := exec.LookPath("htpasswd") // of Debian's apache2-utils, which apache2 needs
	if err != nil {
		t.Fatal(err)
	}
	printed, err := exec.Command(htpasswd, "-nbB", "-C", "5", "carol", "carpenter").Output()
	if err != nil {
		t.Fatal(err)
	}
	w := newUsersWorld(t, "erin:"+argon+"\n"+string(printed), authUsers+"policy visitors {\nusers c*\nmethods CONNECT\n}")
	w.expect("a user of basic_auth", 200, "alice", "wonderland")
	w.expect("a wrong password of one", 407, "alice", "builder")
	w.expect("argon2id", 200, "erin", "explorer")
	w.expect("a wrong password with argon2id", 407, "erin", "wonderland")
	w.expect("htpasswd, with a policy", 403, "carol", "carpenter")
}

// adaptError returns the error for a Caddyfile with a mistake.
func adaptError(text string) error {
	_, _, err := adapt(text, "Caddyfile")
	return err
}

func TestUsersFileMistakes(t *testing.T) {
	const badHash = ":1: the hash of the user 'alice' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it"
	published := "$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG"
	for _, test := range []struct{ text, want string }{
		{"alice", ":1: the line is not a user and a hash; expected <user>:<hash>, as htpasswd -B prints it"},
		{":x", ":1: the line is not a user and a hash; expected <user>:<hash>, as htpasswd -B prints it"},
		{"\nalice:secret", ":2: the hash of the user 'alice' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it"},
		{"alice:$apr1$abc$def", ":1: the hash of the user 'alice' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it"},
		{"alice:$2y$05$short", ":1: the hash of the user 'alice' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it"},
		{strings.TrimSuffix(userLine("alice", "x"), "\n") + userLine("bob", "x"), badHash},
		{strings.TrimSuffix(userLine("alice", "x"), "\n") + "x", badHash},
		{strings.TrimSuffix(userLine("alice", "x"), "\n") + ":x", badHash},
		{strings.TrimSuffix(userLine("alice", "x"), "\n") + " # the boss", badHash},
		{strings.TrimSuffix(userLine("alice", "x"), "x\n")[:60], badHash},
		{"alice: " + strings.TrimPrefix(userLine("alice", "x"), "alice:"), badHash},
		{"alice:$argon2id$v=19$m=64,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$c2hvcnQ", badHash},
		{userLine("alice ", "x"), `:1: the user name "alice " is not valid; expected one without a colon, control characters, and spaces at its ends`},
		{userLine("al\tice", "x"), `:1: the user name "al\tice" is not valid`},
		{"alice:" + published, ":1: the user 'alice' has a hash from Caddy's documentation"},
		{userLine("a", "b") + userLine("a", "c"), ":2: the user 'a' is listed twice; expected each user once"},
	} {
		file := filepath.Join(t.TempDir(), "users")
		if err := os.WriteFile(file, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		for where, err := range map[string]error{
			"Caddyfile": adaptError(fmt.Sprintf(":1 {\nasync_proxy {\nusers_file %s\n}\n}", file)),
			"JSON":      validate(t, fmt.Sprintf(`{"handler": "async_proxy", "users_file": %q}`, file)),
		} {
			if err == nil || !strings.Contains(err.Error(), "users_file: "+file+test.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %q gives %v, want %s", where, test.text, err, test.want)
			}
		}
	}
	if err := adaptError(":1 {\nasync_proxy {\nusers_file /nonexistent/users\n}\n}"); err == nil || !strings.Contains(err.Error(), "/nonexistent/users: no such file") {
		t.Errorf("without a file: %v", err)
	}
}

// The hashes and names of basic_auth are checked as those of a file are, wherever they come from.
func TestBasicAuthMistakes(t *testing.T) {
	whole := strings.TrimSpace(strings.TrimPrefix(userLine("alice", "x"), "alice:"))
	for _, hash := range []string{whole + "x", whole + "bob:" + whole, whole[:59], whole + ":x"} {
		const want = "the hash of the user 'alice' is not valid; expected one for bcrypt, as `caddy hash-password` prints it"
		for where, err := range map[string]error{
			"Caddyfile": adaptError(":1 {\nasync_proxy {\nbasic_auth {\nalice " + hash + "\n}\n}\n}"),
			"JSON":      validate(t, fmt.Sprintf(`{"handler": "async_proxy", "authentication": {"http_basic": {"accounts": [{"username": "alice", "password": %q}]}}}`, hash)),
			"base64":    validate(t, fmt.Sprintf(`{"handler": "async_proxy", "authentication": {"http_basic": {"accounts": [{"username": "alice", "password": %q}]}}}`, base64.StdEncoding.EncodeToString([]byte(hash)))),
		} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q gives %v, want %s", where, hash, err, want)
			}
		}
	}
	if err := adaptError(":1 {\nasync_proxy {\nbasic_auth {\n\" alice\" " + whole + "\n}\n}\n}"); err == nil || !strings.Contains(err.Error(), `the user name " alice" is not valid`) {
		t.Errorf("a name with a space: %v", err)
	}
}

// A mistake in the file and a file without users are among what is wrong now, until they are mended.
func TestUsersFileWarnings(t *testing.T) {
	w := newUsersWorld(t, "\ufeff"+userLine("alice", "wonderland"), "clients 127.0.0.0/8")
	w.expect("a file that begins with a byte order mark", 200, "alice", "wonderland")
	code := func() string {
		for _, warning := range currentWarnings() {
			if strings.HasPrefix(warning.Code, "users_file") {
				return warning.Code + ": " + warning.Text
			}
		}
		return ""
	}
	if got := code(); got != "" {
		t.Errorf("at first: %s", got)
	}
	for _, step := range []struct{ text, want string }{
		{"alice", "users_file_mistake: the users_file cannot be read, and the users stay as they were: " + w.file + ":1: the line is not"},
		{userLine("alice", "wonderland"), ""},
		{"# nobody yet\n", "users_file_empty: the users_file " + w.file + " has no users, so every client is refused; add a user to it"},
		{userLine("alice", "wonderland"), ""},
	} {
		w.write(t, step.text)
		eventually(t, "the warning "+step.want, func() bool {
			got := code()
			return strings.HasPrefix(got, step.want) && (step.want != "" || got == "")
		})
		if want := 200; step.want == "" {
			w.expect("after "+step.text, want, "alice", "wonderland")
		}
	}
	w.waitLog("users_file has no users, so every client is refused; add a user to it", 1)

	// A file that is missing for a while may come back as it was. The log says once that it is missing.
	w.forgetLogs()
	if err := os.Rename(w.file, w.file+".away"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the file to be missed", func() bool { return strings.HasPrefix(code(), "users_file_mistake: ") })
	time.Sleep(usersFileInterval)
	w.expect("without the file", 200, "alice", "wonderland")
	if err := os.Rename(w.file+".away", w.file); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the file to be there again", func() bool { return code() == "" })
	if lines := w.logLines("users_file cannot be read; the users stay as they were"); len(lines) != 1 {
		t.Errorf("logged %v", lines)
	}
	w.write(t, "")
	eventually(t, "the users to go", func() bool { return w.status("alice", "wonderland") == 407 })
}

// The password of an unknown user is compared with the hash of a known one, whose cost may not be that of
// Caddy's own.
func TestUnknownUsersCostAsMuch(t *testing.T) {
	fake := caddyauth.BcryptHash{}.FakeHash()
	hash := strings.TrimSpace(strings.TrimPrefix(userLine("bob", "pa55w0rd"), "bob:"))
	for name, options := range map[string]string{
		"users_file":                "",
		"basic_auth":                "basic_auth {\nbob " + hash + "\n}",
		"basic_auth and users_file": "basic_auth {\nalice " + hash + "\n}",
	} {
		t.Run(name, func(t *testing.T) {
			var w *usersWorld
			if strings.Contains(name, "users_file") {
				w = newUsersWorld(t, "bob:"+hash+"\n", options)
			} else {
				w = &usersWorld{world: newWorld(t, options, nil)}
			}
			for p := range currentProcess().proxies.All() {
				if same, err := p.basic().Hash.Compare(fake, []byte("pa55w0rd")); err != nil || !same {
					t.Errorf("the hash is not that of a user: %v", err)
				}
			}
			if got := w.status("mallory", "pa55w0rd"); got != http.StatusProxyAuthRequired {
				t.Errorf("an unknown user: %d", got)
			}
			if got := w.status("bob", "pa55w0rd"); got != http.StatusOK {
				t.Errorf("a user: %d", got)
			}
		})
	}
	// In JSON, the hash may be in base64.
	basic := &caddyauth.HTTPBasicAuth{Hash: caddyauth.BcryptHash{}, Accounts: map[string]caddyauth.Account{"bob": {Password: base64.StdEncoding.EncodeToString([]byte(hash))}}}
	hideUnknownUsers(basic, fake)
	if same, err := basic.Hash.Compare(fake, []byte("pa55w0rd")); err != nil || !same {
		t.Errorf("the hash in base64 is not that of a user: %v", err)
	}
}
