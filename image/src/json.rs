//! JSON as Go's decoder reads it, for which all documents of images are written: names of
//! fields in any case, the last of what comes twice, `null` for what is empty.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, MapAccess};
use serde::de::{SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Error, Number};

/// Reads a document.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    let value: Value = serde_json::from_slice(text)?;
    T::deserialize(value)
}

/// Any value, with an object's members in their order.
enum Value {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Value>),
    Object(Vec<(String, Value)>),
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        let number = number.ok_or_else(|| E::invalid_value(Unexpected::Float(value), &self))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = list.next_element()? {
            all.push(value);
        }
        Ok(Value::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(member) = object.next_entry()? {
            all.push(member);
        }
        Ok(Value::Object(all))
    }
}

/// True if Go takes one name for the other: Unicode's simple folding, by which two signs
/// beyond ASCII are letters of it.
fn same(name: &str, field: &str) -> bool {
    let folded = |char| match char {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        char => char.to_ascii_lowercase(),
    };
    name.chars().map(folded).eq(field.chars().map(folded))
}

/// An object's members by the names of a type's fields.
fn folded(members: Vec<(String, Value)>, fields: &'static [&'static str]) -> Vec<(String, Value)> {
    let mut all: Vec<(String, Value)> = Vec::new();
    for (name, value) in members {
        let exact = fields.iter().find(|field| **field == name);
        let field = exact.or_else(|| fields.iter().find(|field| same(&name, field)));
        let Some(field) = field else {
            // Unknown, and of no interest.
            continue;
        };
        match all.iter_mut().find(|(other, _)| other == field) {
            Some((_, before)) => before.then(value),
            None => all.push(((*field).to_owned(), value)),
        }
    }
    all
}

impl Value {
    /// What a field has after another value came for it.
    fn then(&mut self, later: Value) {
        match (self, later) {
            (Value::Object(members), Value::Object(more)) => members.extend(more),
            // As in Go, null leaves a value as it is that cannot be null.
            (Value::Bool(_) | Value::Number(_) | Value::Text(_), Value::Null) => {}
            (before, later) => *before = later,
        }
    }

    fn or(self, empty: Value) -> Value {
        match self {
            Value::Null => empty,
            value => value,
        }
    }
}

impl IntoDeserializer<'_, Error> for Value {
    type Deserializer = Value;

    fn into_deserializer(self) -> Value {
        self
    }
}

/// Methods for kinds of values, of which `null` is an empty one.
macro_rules! or_empty {
    ($($method:ident: $empty:expr,)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.or($empty).deserialize_any(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Value {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(value) => value.deserialize_any(visitor),
            Value::Text(value) => visitor.visit_string(value),
            Value::List(values) => {
                let mut list = SeqDeserializer::new(values.into_iter());
                let value = visitor.visit_seq(&mut list)?;
                list.end()?;
                Ok(value)
            }
            Value::Object(members) => visitor.visit_map(MapDeserializer::new(members.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Value::Null => visitor.visit_none(),
            value => visitor.visit_some(value),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.or(Value::Object(Vec::new())) {
            Value::Object(members) => {
                Value::Object(folded(members, fields)).deserialize_any(visitor)
            }
            // Other than derived code, Go takes no list for one.
            Value::List(_) => Err(Error::invalid_type(Unexpected::Seq, &visitor)),
            other => other.deserialize_any(visitor),
        }
    }

    or_empty! {
        deserialize_bool: Value::Bool(false),
        deserialize_u8: Value::Number(0.into()),
        deserialize_u16: Value::Number(0.into()),
        deserialize_u32: Value::Number(0.into()),
        deserialize_u64: Value::Number(0.into()),
        deserialize_i64: Value::Number(0.into()),
        deserialize_str: Value::Text(String::new()),
        deserialize_string: Value::Text(String::new()),
        deserialize_seq: Value::List(Vec::new()),
        deserialize_map: Value::Object(Vec::new()),
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
        enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Outer {
        stop_signal: String,
        env: Vec<String>,
        labels: BTreeMap<String, String>,
        inner: Option<Inner>,
        size: u64,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Inner {
        one: String,
        two: String,
    }

    fn read(text: &str) -> Outer {
        from_slice(text.as_bytes()).unwrap()
    }

    #[test]
    fn fields_have_names_in_any_case_and_keys_are_kept() {
        let outer = read(
            r#"{"stopsignal":"a","ENV":["x"],"labels":{"Key":"1","kEY":"2"},"inner":{"ONE":"1"}}"#,
        );
        assert_eq!(
            (outer.stop_signal.as_str(), outer.env.as_slice()),
            ("a", &["x".to_owned()][..])
        );
        assert_eq!(outer.labels.len(), 2);
        assert_eq!(outer.inner.unwrap().one, "1");
        assert_eq!(read("{\"\u{17f}top\u{17f}ignal\":\"a\"}").stop_signal, "a");
        assert_eq!(read(r#"{"stop_signal":"a"}"#), Outer::default());
    }

    #[test]
    fn the_last_of_what_comes_twice_holds() {
        let outer = read(
            r#"{"Env":["a"],"env":["b"],"StopSignal":"a","stopSignal":null,"Size":1,"size":2,
                "Inner":{"one":"1","two":"1"},"INNER":{"two":"2"},"labels":{"a":"1","a":"2"}}"#,
        );
        assert_eq!(
            (outer.env.as_slice(), outer.size),
            (&["b".to_owned()][..], 2)
        );
        assert_eq!(outer.stop_signal, "a");
        let inner = Inner {
            one: "1".into(),
            two: "2".into(),
        };
        assert_eq!(outer.inner, Some(inner));
        assert_eq!(outer.labels["a"], "2");
    }

    #[test]
    fn nothing_is_what_is_empty() {
        let text = r#"{"StopSignal":null,"Env":null,"Labels":{"a":null},"Inner":null,"Size":null}"#;
        let labels = [("a".to_owned(), String::new())].into();
        assert_eq!(
            read(text),
            Outer {
                labels,
                ..Outer::default()
            }
        );
    }

    #[test]
    fn what_is_no_such_document_is_refused() {
        for text in [
            "[]",
            "1",
            "\"\"",
            r#"{"Env":{}}"#,
            r#"{"Size":-1}"#,
            r#"{"Size":"1"}"#,
            "{}x",
        ] {
            assert!(from_slice::<Outer>(text.as_bytes()).is_err(), "{text}");
        }
        let deep = [vec![b'['; 1 << 20], vec![b']'; 1 << 20]].concat();
        assert!(from_slice::<Outer>(&deep).is_err());
    }
}
